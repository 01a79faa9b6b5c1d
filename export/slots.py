"""Rewrites the model builder's ONNX graph into the one that the runtime executes.

Changes, independent of the quantisation:
- adapter slots: `y = MatMul(x)` becomes `y = MatMul(x) + (x A^T) B` with A and B as graph inputs;
- the head runs only on the requested positions (input `logit_positions`);
- sequence lengths are inputs (`seqlens_k`, `total_sequence_length`) instead of being summed from
  an attention mask that grows with every token;
- every attention layer has the window size of the source's configuration.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import onnx
from onnx import TensorProto, helper

from dlp_edge.bundle.manifest import Slot, SlotPart
from dlp_edge.errors import BackboneError
from dlp_edge.models.architectures import PROJECTION_OF, Projection, module_name

_WINDOW_ATTRIBUTES = ("local_window_size", "sliding_window_cache")
_LAYER = re.compile(r"^model\.layers\.(\d+)\.(.+)$")


def prepare_graph(
    model: onnx.ModelProto,
    modules: Iterable[str],
    sizes: dict[str, tuple[int, int]],
    windows: Sequence[int],
    rotary: Sequence[bool] | None = None,
) -> tuple[Slot, ...]:
    """Rewrite the builder's graph in place; returns its slots.

    Args:
        model: the graph, without its external data.
        modules: linear layers that some adapter changes, by full name.
        sizes: (input size, output size) of every linear layer of the backbone.
        windows: attention window of each decoder layer in tokens; -1 for all.
        rotary: whether each decoder layer has a rotary embedding; None means that all have.

    Raises:
        BackboneError: the graph lacks a node that the rewrite needs.
    """
    graph = model.graph
    _select_logit_positions(graph)
    _give_lengths(graph)
    _set_windows(graph, windows)
    if rotary is not None:
        _remove_rotary(graph, rotary)
    slots = _plan_slots(graph, modules, sizes)
    for slot in slots:
        _insert_slot(graph, slot)
    return tuple(slots)


def _select_logit_positions(graph: onnx.GraphProto) -> None:
    """Gather the hidden states [B, S, h] at `logit_positions` [K] before the head."""
    head = _find(graph, "/lm_head/MatMul")
    gather = helper.make_node(
        "Gather",
        [head.input[0], "logit_positions"],
        ["/lm_head/selected"],
        name="/lm_head/select",
        axis=1,
    )
    head.input[0] = "/lm_head/selected"
    graph.node.insert(list(graph.node).index(head), gather)
    graph.input.append(helper.make_tensor_value_info("logit_positions", TensorProto.INT64, ["K"]))
    shape = graph.output[0].type.tensor_type.shape
    if graph.output[0].name != "logits":
        raise BackboneError("the graph's first output is not `logits`", "Update onnxruntime-genai")
    shape.dim[1].dim_param = "K"


def _give_lengths(graph: onnx.GraphProto) -> None:
    """Replace the attention mask and its reduction by the two lengths that attention takes."""
    attention = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    if not attention:
        raise BackboneError(
            "the graph has no GroupQueryAttention",
            "Choose a backbone whose attention the builder maps to it",
        )
    names = (attention[0].input[5], attention[0].input[6])
    for node in attention:
        if (node.input[5], node.input[6]) != names:
            raise BackboneError("attention layers differ in their lengths", "Report this backbone")
        node.input[5], node.input[6] = "seqlens_k", "total_sequence_length"
    kept = [value for value in graph.input if value.name not in ("attention_mask", "position_ids")]
    del graph.input[:]
    graph.input.extend(kept)
    graph.input.append(helper.make_tensor_value_info("seqlens_k", TensorProto.INT32, ["B"]))
    graph.input.append(
        helper.make_tensor_value_info("total_sequence_length", TensorProto.INT32, [])
    )
    _remove_unused(graph)


def _set_windows(graph: onnx.GraphProto, windows: Sequence[int]) -> None:
    """Set every attention window from the configuration.

    The builder omits Mistral's, and gives others a cache as short as the window; ours is full
    length, so that it can be truncated and reused.
    """
    for node in graph.node:
        if node.op_type != "GroupQueryAttention":
            continue
        kept = [a for a in node.attribute if a.name not in _WINDOW_ATTRIBUTES]
        del node.attribute[:]
        node.attribute.extend(kept)
        layer = re.search(r"/layers\.(\d+)/", node.name)
        if layer is None:
            raise BackboneError(f"{node.name} belongs to no layer", "Update onnxruntime-genai")
        node.attribute.append(helper.make_attribute("local_window_size", windows[int(layer[1])]))


def _remove_rotary(graph: onnx.GraphProto, rotary: Sequence[bool]) -> None:
    """Take the rotary embedding out of the layers that have none."""
    for node in graph.node:
        layer = re.search(r"/layers\.(\d+)/", node.name)
        if node.op_type != "GroupQueryAttention" or layer is None or rotary[int(layer[1])]:
            continue
        kept = [a for a in node.attribute if a.name != "do_rotary"]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute("do_rotary", 0)])
        for index in (7, 8):  # cosines and sines
            node.input[index] = ""


def _remove_unused(graph: onnx.GraphProto) -> None:
    """Remove nodes that no output depends on."""
    needed = {output.name for output in graph.output}
    kept: list[onnx.NodeProto] = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    fed = {value.name for value in graph.input} | {value.name for value in graph.initializer}
    made = {name for node in graph.node for name in node.output}
    missing = sorted(needed - fed - made - {""} - {output.name for output in graph.output})
    if missing:
        raise BackboneError(
            f"the graph still needs {missing[0]} after its mask was removed",
            "Choose a backbone with rotary positions inside its attention",
        )


def _plan_slots(
    graph: onnx.GraphProto, modules: Iterable[str], sizes: dict[str, tuple[int, int]]
) -> list[Slot]:
    wanted = set(modules)
    layers = sorted({int(_split(module)[0]) for module in wanted})
    nodes = {_base_name(node.name) for node in graph.node}
    slots: list[Slot] = []
    for layer in layers:
        kinds = [kind for kind in PROJECTION_OF if module_name(layer, kind) in wanted]
        groups: dict[str, list[Projection]] = {}
        for kind in kinds:
            projection = PROJECTION_OF[kind]
            groups.setdefault(_node_of(projection, layer, nodes), []).append(projection)
        for node, projections in groups.items():
            slots.append(_make_slot(layer, node, projections, sizes))
    return slots


def _node_of(projection: Projection, layer: int, nodes: set[str]) -> str:
    """The node that computes a projection: the packed one where the builder packed it."""
    if projection.packed and f"/model/layers.{layer}/{projection.packed}/MatMul" in nodes:
        return projection.packed
    return projection.node


def _make_slot(
    layer: int, node: str, wanted: list[Projection], sizes: dict[str, tuple[int, int]]
) -> Slot:
    """A slot over one node; a packed node holds its layers side by side in their usual order."""
    members = [
        projection
        for projection in PROJECTION_OF.values()
        if node in (projection.node, projection.packed)
        and module_name(layer, projection.module) in sizes
    ]
    parts: list[SlotPart] = []
    start = 0
    for projection in members:
        module = module_name(layer, projection.module)
        stop = start + sizes[module][1]
        if projection in wanted:
            parts.append(SlotPart(module, start, stop))
        start = stop
    input_size = sizes[parts[0].module][0]
    return Slot(f"model.layers.{layer}.{node.replace('/', '.')}", input_size, start, tuple(parts))


def _insert_slot(graph: onnx.GraphProto, slot: Slot) -> None:
    layer, kind = _split(slot.name)
    prefix = f"/model/layers.{layer}/{kind.replace('.', '/')}"
    base = _find(graph, f"{prefix}/MatMul")
    x, y = base.input[0], base.output[0]
    base.output[0] = f"{prefix}/base"
    a, b = f"{slot.name}.A", f"{slot.name}.B"
    dtype = _float_type(graph)
    nodes = [
        # transB: A keeps PEFT's layout, so that fusing adapters copies whole rows.
        helper.make_node(
            "FusedMatMul",
            [x, a],
            [f"{prefix}/slot/down"],
            name=f"{prefix}/slot/A",
            domain="com.microsoft",
            transB=1,
        ),
        helper.make_node(
            "MatMul", [f"{prefix}/slot/down", b], [f"{prefix}/slot/up"], name=f"{prefix}/slot/B"
        ),
        helper.make_node(
            "Add", [f"{prefix}/base", f"{prefix}/slot/up"], [y], name=f"{prefix}/slot/Add"
        ),
    ]
    position = list(graph.node).index(base) + 1
    for offset, node in enumerate(nodes):
        graph.node.insert(position + offset, node)
    rank = f"{slot.name}.rank"
    graph.input.append(helper.make_tensor_value_info(a, dtype, ["G", rank, slot.input_size]))
    graph.input.append(helper.make_tensor_value_info(b, dtype, ["G", rank, slot.output_size]))


def _find(graph: onnx.GraphProto, name: str) -> onnx.NodeProto:
    for node in graph.node:
        if _base_name(node.name) == name:
            return node
    raise BackboneError(f"the graph has no node {name}", "Update onnxruntime-genai")


def _base_name(name: str) -> str:
    """Quantisers append the number of bits to a node's name (`.../MatMul_Q8`)."""
    return re.sub(r"_Q\d+\w*$", "", name)


def _split(name: str) -> tuple[str, str]:
    match = _LAYER.match(name)
    if match is None:
        raise BackboneError(f"{name} is not a linear layer of a decoder layer", "Check its adapter")
    return match.group(1), match.group(2)


def _float_type(graph: onnx.GraphProto) -> int:
    return int(graph.output[0].type.tensor_type.elem_type)
