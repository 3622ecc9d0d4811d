"""Make tests/artifacts anew: `python tests/make_artifacts.py`.

Tiny models with random weights, exported as any other: image captioners that see patches of mean
colour, without attention and with it, and BLIP-2s of OPT and of T5. They are committed, so that
tests/runtime runs where nothing can make artifacts.
"""

import shutil
import sys
import tempfile
from collections import OrderedDict
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = Path(__file__).parent / "artifacts"


def small_captioner(decoder: str):
    import torch
    from conftest import WORDS

    from capexport.families.cnn_lstm import Vocabulary
    from capexport.models.checkpoint import Checkpoint
    from capexport.models.cnn_lstm import CnnLstm, CnnLstmConfig
    from capexport.preprocessing import ImageSpec

    torch.manual_seed(1)
    vocabulary = Vocabulary((*Vocabulary.SPECIALS, *WORDS))
    sizes = {"embed_size": 24, "hidden_size": 32, "decoder": decoder, "backbone": "resnet18"}
    model = CnnLstm(CnnLstmConfig(len(vocabulary), **sizes))
    if decoder == "lstm":
        parts = {
            "backbone": torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4)),
            "flatten": torch.nn.Flatten(),
        }
        parts["linear"] = torch.nn.Linear(48, 24)
    else:
        parts = {"backbone": torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d((3, 4)))}
        parts["linear"] = torch.nn.Conv2d(3, 512, 1)
    model.encoder = torch.nn.Sequential(OrderedDict(parts))
    louder = {"encoder.linear": 4, "decoder.lstm.weight": 4, "decoder.output.weight": 4}
    louder |= {"decoder.query": 8, "decoder.first": 4, "decoder.deep": 16}
    with torch.no_grad():  # captions then differ from photo to photo
        for name, weight in model.named_parameters():
            weight.mul_(next((by for part, by in louder.items() if name.startswith(part)), 1))
    return Checkpoint(model.eval(), vocabulary, ImageSpec(), sha256="0" * 64)


def main() -> None:
    from blip2_models import save_small_checkpoint

    from capexport.export.blip2 import export_blip2
    from capexport.export.cnn_lstm import export_cnn_lstm

    shutil.rmtree(FOLDER, ignore_errors=True)
    export_cnn_lstm(small_captioner("lstm"), FOLDER / "cnn-lstm")
    export_cnn_lstm(small_captioner("attention"), FOLDER / "attention")
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("opt", "t5"):
            export_blip2(save_small_checkpoint(Path(folder, kind), kind), FOLDER / kind)
    for card in FOLDER.glob("*/README.md"):
        card.unlink()


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    main()
