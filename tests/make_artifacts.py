"""Make tests/artifacts anew: `python tests/make_artifacts.py`.

Tiny models with random weights, exported as any other: an image captioner that sees 16 patches of
mean colour, and BLIP-2s of OPT and of T5. They are committed, so that tests/runtime runs
where nothing can make artifacts.
"""

import shutil
import sys
import tempfile
from collections import OrderedDict
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = Path(__file__).parent / "artifacts"


def small_captioner():
    import torch
    from conftest import WORDS

    from capexport.families.cnn_lstm import Vocabulary
    from capexport.models.checkpoint import Checkpoint
    from capexport.models.cnn_lstm import CnnLstm, CnnLstmConfig
    from capexport.preprocessing import ImageSpec

    torch.manual_seed(1)
    vocabulary = Vocabulary((*Vocabulary.SPECIALS, *WORDS))
    model = CnnLstm(CnnLstmConfig(len(vocabulary), embed_size=24, hidden_size=32))
    parts = {"backbone": torch.nn.AdaptiveAvgPool2d(4), "flatten": torch.nn.Flatten()}
    model.encoder = torch.nn.Sequential(OrderedDict(parts, linear=torch.nn.Linear(48, 24)))
    with torch.no_grad():  # captions then differ from photo to photo
        for name, weight in model.named_parameters():
            if name.startswith(("encoder.linear", "decoder.lstm.weight", "decoder.output.weight")):
                weight.mul_(4)
    return Checkpoint(model.eval(), vocabulary, ImageSpec(), sha256="0" * 64)


def main() -> None:
    from blip2_models import save_small_checkpoint

    from capexport.export.blip2 import export_blip2
    from capexport.export.cnn_lstm import export_cnn_lstm

    shutil.rmtree(FOLDER, ignore_errors=True)
    export_cnn_lstm(small_captioner(), FOLDER / "cnn-lstm")
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("opt", "t5"):
            export_blip2(save_small_checkpoint(Path(folder, kind), kind), FOLDER / kind)
    for card in FOLDER.glob("*/README.md"):
        card.unlink()


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    main()
