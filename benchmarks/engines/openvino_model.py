"""A GGUF file as an OpenVINO model whose layers have the names that adapters look for.

    python -m benchmarks.engines.openvino_model FILE.gguf OUT

OpenVINO GenAI reads GGUF files, but numbers the layers: PEFT's adapters match none of them, which
it says on stderr and answers as the base model. So its model is saved, and the layers are named.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import openvino as ov
import openvino_genai as og

# In the order in which its reader makes them.
LAYERS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def write(gguf: Path, out: Path) -> None:
    """Writes the model, tokenizer included, into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / gguf.name
        copy.symlink_to(gguf.resolve())
        og.LLMPipeline(str(copy), "CPU", enable_save_ov_model=True)
        model = ov.Core().read_model(Path(scratch) / "openvino_model.xml")
        name_layers(model)
        ov.save_model(model, out / "openvino_model.xml", compress_to_fp16=False)
        del model  # it maps the scratch file
        for path in Path(scratch).glob("openvino_*tokenizer.*"):
            shutil.copy(path, out)


def name_layers(model: ov.Model) -> None:
    """Gives the products with weights the names that an export from PyTorch has."""
    products = [
        node
        for node in model.get_ordered_ops()
        if node.get_type_name() == "MatMul" and node.input(1).get_partial_shape().is_static
    ]
    products.sort(key=lambda node: int(node.get_friendly_name().split("_")[1]))
    *products, _head = products
    for number, node in enumerate(products):
        layer, place = divmod(number, len(LAYERS))
        name = f"__module.model.layers.{layer}.{LAYERS[place]}/ov_ext::linear/MatMul"
        node.set_friendly_name(name)


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
