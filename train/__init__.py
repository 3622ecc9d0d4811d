"""Training and scoring of the CNN-LSTM captioner: `python -m train`."""
