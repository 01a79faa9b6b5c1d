"""`dlp-edge train-skill EXAMPLES -o ADAPTER`: a skill's examples -> a PEFT adapter."""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from dlp_edge.bundle.bundle import open_bundle
from dlp_edge.bundle.manifest import Manifest
from dlp_edge.cli import options, output
from dlp_edge.cli.verbs.export import progress_bar, require_extra
from dlp_edge.errors import BackboneError, UsageError
from dlp_edge.tasks.samples import Sample, read_samples

if TYPE_CHECKING:
    from dlp_edge.export.source import Source
    from dlp_edge.models.skill_examples import PromptFormat
    from dlp_edge.models.skill_training import SkillReport

TARGETS = ("q_proj", "v_proj")
FEW = 10  # with fewer examples, all are trained on
HELD_OUT = 10  # one in so many examples is measured on
PAIRS = 3  # one in so many examples is also asked beside another skill's


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "train-skill",
        help="train an adapter on the examples of a skill",
        description="Trains a LoRA adapter for a backbone, which `export` or `add` then puts into "
        "a bundle. 50 examples are enough to begin with. One in ten is not trained on: the "
        "report says how well its answer is predicted, before and after. An interrupted training "
        "resumes when started again.",
    )
    parser.add_argument(
        "examples", type=Path, metavar="EXAMPLES", help='lines of {"prompt", "response"}'
    )
    parser.add_argument("--backbone", required=True, metavar="DIR|HUB_ID|FILE.gguf")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="ADAPTER")
    parser.add_argument(
        "--bundle",
        type=Path,
        help="the bundle that the skill is for: its chat template, and the matrices it has slots "
        "for",
    )
    parser.add_argument(
        "--chat-template", type=Path, metavar="FILE", help="Jinja file instead of the backbone's"
    )
    parser.add_argument(
        "--beside",
        type=Path,
        metavar="TASKS_DIR",
        help="other skills, NAME/train.jsonl: examples are also asked together with theirs",
    )
    count = options.whole_number
    parser.add_argument("--rank", type=count(1), default=8, help="of the adapter (8)")
    parser.add_argument("--epochs", type=count(1), help="default: 2, more for few examples")
    parser.add_argument("--targets", metavar="A,B", help=f"matrices ({','.join(TARGETS)})")
    parser.add_argument("--seed", type=int, default=0)
    options.add_output(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    samples = read_samples(arguments.examples)
    others = _read_others(arguments.beside, arguments.examples)
    manifest = None if arguments.bundle is None else open_bundle(arguments.bundle).manifest
    template = None
    if arguments.chat_template is not None:
        template = options.read_text(arguments.chat_template)
    with require_extra("export"):
        from dlp_edge.export.source import load_source
        from dlp_edge.export.suppress_output import suppress_output
    with require_extra("export"), suppress_output():
        from dlp_edge.models.skill_examples import single, skill_examples
        from dlp_edge.models.skill_training import SkillRecipe, train_skill

    recipe = SkillRecipe(
        arguments.rank,
        arguments.epochs,
        seed=arguments.seed,
        targets=_targets(arguments.targets, manifest),
    )
    rng = random.Random(arguments.seed)
    held_out, trained_on = _split(samples, rng)
    with progress_bar(arguments.quiet) as tell, load_source(arguments.backbone) as source:
        form = _prompt_format(source, manifest, template)
        report = train_skill(
            source.folder,
            skill_examples(form, trained_on, others, PAIRS, rng),
            [single(form, sample) for sample in held_out],
            arguments.output,
            recipe,
            source.name if manifest is None else manifest.backbone.name,
            tell,
        )
    if arguments.json:
        output.print_json({"adapter": str(arguments.output), **asdict(report)})
    else:
        _print(report, arguments.output)
    return 0


def _read_others(folder: Path | None, own: Path) -> dict[str, Sequence[Sample]]:
    """The other skills' samples; the skill's own file may lie among them."""
    if folder is None:
        return {}
    found = sorted(folder.glob("*/train.jsonl"))
    files = [path for path in found if path.resolve() != own.resolve()]
    if not files:
        raise UsageError(f"{folder} has no NAME/train.jsonl", "Name a folder of other skills")
    return {path.parent.name: read_samples(path) for path in files}


def _split(samples: Sequence[Sample], rng: random.Random) -> tuple[list[Sample], list[Sample]]:
    """Samples to measure on, and those to train on."""
    shuffled = rng.sample(samples, len(samples))
    count = 0 if len(samples) < FEW else len(samples) // HELD_OUT
    return shuffled[:count], shuffled[count:]


def _targets(wanted: str | None, manifest: Manifest | None) -> tuple[str, ...]:
    """The matrices that the adapter changes: those asked for, or the bundle's slots."""
    if wanted is not None:
        return tuple(name.strip() for name in wanted.split(",") if name.strip())
    if manifest is None:
        return TARGETS
    modules = {part.module for slot in manifest.backbone.slots for part in slot.parts}
    return tuple(sorted({module.rpartition(".")[2] for module in modules})) or TARGETS


def _prompt_format(source: Source, manifest: Manifest | None, template: str | None) -> PromptFormat:
    """The backbone's, or the bundle's.

    Raises:
        BackboneError: the bundle was made of another backbone.
    """
    from tokenizers import Tokenizer

    from dlp_edge.models.skill_examples import PromptFormat
    from dlp_edge.untrusted.chat_template import ChatTemplate

    if manifest is not None and manifest.backbone.fingerprint != source.fingerprint:
        raise BackboneError(
            f"the bundle was made of {manifest.backbone.name}, not of these weights",
            "Give its own backbone",
        )
    own = source.chat_template if manifest is None else manifest.chat_template
    tokenizer = Tokenizer.from_file(str(source.folder / "tokenizer.json"))
    end = source.eos_token or tokenizer.id_to_token(source.eos_token_ids[0]) or ""
    return PromptFormat(tokenizer, ChatTemplate(template or own), source.bos_token, end)


def _print(report: SkillReport, folder: Path) -> None:
    print(f"adapter   {folder}")
    left_out = f", {report.left_out} too long" if report.left_out else ""
    print(f"examples  {report.examples} trained on{left_out}, {report.held_out} held out")
    print(f"steps     {report.steps} ({report.epochs} epochs), loss {report.loss:.3f}")
    if report.before is not None and report.after is not None:
        print(f"{'held out':10}{'loss':>7} {'tokens right':>13} {'answers right':>14}")
        for label, fit in (("before", report.before), ("after", report.after)):
            print(f"  {label:<8}{fit.loss:>7.3f} {fit.tokens:>13.1%} {fit.answers:>14.1%}")
    print(f"time      {report.seconds:.0f} s")
