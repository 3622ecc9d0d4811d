"""The model card that goes with an artifact: what the Hugging Face hub shows of a folder."""

from __future__ import annotations

import json
from typing import Any

from capexport.artifact import Manifest, is_hub_id

FILE_NAME = "README.md"  # no part of the artifact, so it may be rewritten


def model_card(manifest: Manifest, name: str) -> str:
    """Markdown with the hub's metadata (huggingface.co/docs/hub/model-cards) in front."""
    parts = [_metadata(manifest), f"# {name}", _use(manifest), _parity(manifest), _origin(manifest)]
    return "\n\n".join(parts) + "\n"


def _metadata(manifest: Manifest) -> str:
    source = manifest.provenance.source
    fields: dict[str, Any] = {
        "license": manifest.provenance.licence,
        "library_name": "capexport",
        "pipeline_tag": "image-to-text",
        "tags": ["image-captioning", "onnx", manifest.family],
        "base_model": source if source and is_hub_id(source) else None,
    }
    lines = [f"{key}: {json.dumps(value)}" for key, value in fields.items() if value is not None]
    return "\n".join(["---", *lines, "---"])


def _use(manifest: Manifest) -> str:
    return (
        f"An image captioner ({manifest.family}) in ONNX, {manifest.precision}, "
        f"{manifest.size / 1e6:.1f} MB. It runs on CPU or CUDA without PyTorch:\n\n"
        "```python\nfrom capexport import Captioner\n\n"
        'captioner = Captioner.load("FOLDER or OWNER/NAME")\n'
        'print(captioner.caption("photo.jpg").text)\n```'
    )


def _parity(manifest: Manifest) -> str:
    parity = manifest.parity
    assert parity is not None
    captions = parity.captions
    count = captions.images or captions.compared
    lines = ["## Against PyTorch in float32", ""]
    if parity.int8:
        lines.append(
            f"{parity.int8['identical_captions']:.1%} of captions and "
            f"{parity.int8['token_agreement']:.1%} of tokens are PyTorch's to the letter "
            f"({count} {parity.inputs}); before quantisation, all were."
        )
    else:
        lines.append(f"{captions.identical} of {count} captions are PyTorch's to the last token.")
    if parity.metrics:
        names = [name for name, value in next(iter(parity.metrics.values())).items() if value]
        lines += ["", "| | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
        for name, scores in parity.metrics.items():
            cells = (f"{v:.1f}" if isinstance(v, float) else str(v) for v in scores.values())
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _origin(manifest: Manifest) -> str:
    provenance = manifest.provenance
    hashes = provenance.checkpoint_sha256
    hashes = {"weights": hashes} if isinstance(hashes, str) else hashes
    versions = ", ".join(f"{name} {version}" for name, version in provenance.versions.items())
    trained = (provenance.training or {}).get("command")
    lines = ["## Where it comes from", ""]
    if provenance.source:
        revision = f", revision {provenance.revision}" if provenance.revision else ""
        lines.append(f"- {provenance.source}{revision}")
    lines += [f"- trained by `{trained}`"] if trained else []
    lines += [f"- SHA-256 of {name}: `{digest}`" for name, digest in hashes.items()]
    lines.append(f"- exported with {versions}")
    return "\n".join(lines)
