"""Writes the backbone as a Hugging Face folder, with the chat template that the skills know."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from dlp_edge.export.source import Source, read_json

_AS_THEY_ARE = (
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "model.safetensors.index.json",
)


def write_model(source: Source, chat_template: str | None, folder: Path) -> None:
    """Copies the source's weights in their own type, and what belongs to them."""
    folder.mkdir()
    for name in _AS_THEY_ARE:
        if (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, folder / name)
    for path in source.folder.glob("*.safetensors"):
        shutil.copyfile(path, folder / path.name)
    settings = {}
    if (source.folder / "tokenizer_config.json").is_file():
        settings = read_json(source.folder, "tokenizer_config.json")
    settings.pop("chat_template", None)  # one template, in a file of its own
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
