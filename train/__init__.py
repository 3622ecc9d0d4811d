"""Training and scoring of captioners: `python -m train`, `train.blip2` and `train.score`."""
