"""Adding and removing skills of a finished bundle: the runtime, the files, the command line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlp_edge import Runtime
from dlp_edge.bundle.bundle import open_bundle
from dlp_edge.bundle.edition import write_edition
from dlp_edge.bundle.router_head import RouterHead, head_from_bytes, head_to_bytes
from dlp_edge.cli.main import main
from dlp_edge.errors import (
    AdapterError,
    BundleError,
    DlpEdgeError,
    ResourceError,
    RouterError,
    UsageError,
)
from dlp_edge.runtime.adapters import fit_router_row
from dlp_edge.runtime.adapters.fit_router_row import fit_row
from tests.testing.families import make_adapter
from tests.testing.parrot import PARROT

KNOWN = {
    "sums": "Tom has 12 apples and buys 7. How many?",
    "sql": "Select the age of row 31",
    "email": "Write an email to Ann about day 12",
}


def top(runtime: Runtime, prompt: str) -> str:
    return runtime.route(prompt, min_confidence=0.0).selected[0]


@pytest.mark.slow
class TestRuntime:
    def test_a_new_skill_is_routed_to_and_survives_a_reload(
        self, bundle_copy: Path, parrot: Path
    ) -> None:
        with Runtime(bundle_copy) as runtime:
            info = runtime.add_adapter("parrot", parrot, examples=PARROT)
            assert (info.name, info.rank, info.routed) == ("parrot", 3, True)
            assert top(runtime, "Repeat after me the word cloud") == "parrot"
            assert {top(runtime, prompt): prompt for prompt in KNOWN.values()} == KNOWN
            reply = runtime.generate("Repeat after me the word cloud", max_new_tokens=6)
        with Runtime(bundle_copy) as again:
            assert top(again, "Repeat after me the word cloud") == "parrot"
            assert (
                again.generate("Repeat after me the word cloud", max_new_tokens=6).text
                == reply.text
            )
            assert again.adapters[-1] == info

    def test_it_writes_what_the_same_adapter_would_have_written_at_export(
        self, bundle_copy: Path, tiny_adapters: dict[str, Path]
    ) -> None:
        pinned = {"adapters": "sql", "max_new_tokens": 12}
        with Runtime(bundle_copy) as runtime:
            before = runtime.generate("Hello", **pinned).text  # type: ignore[arg-type]
            runtime.remove_adapter("sql")
            with pytest.raises(UsageError, match="no adapter 'sql'"):
                runtime.generate("Hello", adapters="sql")
            runtime.add_adapter("sql", tiny_adapters["sql"])
            assert runtime.generate("Hello", **pinned).text == before  # type: ignore[arg-type]

    def test_without_examples_it_is_never_routed_to(self, bundle_copy: Path, parrot: Path) -> None:
        with Runtime(bundle_copy) as runtime:
            before = runtime.route(KNOWN["sums"])
            assert not runtime.add_adapter("parrot", parrot).routed
            assert runtime.route(KNOWN["sums"]) == before
            assert runtime.generate("Hello", adapters="parrot", max_new_tokens=4).text

    def test_a_skill_that_comes_and_goes_stays_welcome(
        self, bundle_copy: Path, parrot: Path
    ) -> None:
        """What is left of a removed skill neither speaks against its return nor piles up."""
        prompt = "Repeat after me the word cloud"
        with Runtime(bundle_copy) as runtime:
            found = []
            for _ in range(5):
                runtime.add_adapter("parrot", parrot, examples=PARROT)
                found.append(runtime.route(prompt).probabilities["parrot"])
                runtime.remove_adapter("parrot")
                size = len(open_bundle(bundle_copy).router_head().rows)
                found.append(size)
        assert found[::2] == pytest.approx(found[:1] * 5, abs=0.02)
        assert len(set(found[1::2])) == 1

    def test_old_skills_say_of_each_other_what_they_said(
        self, bundle_copy: Path, parrot: Path
    ) -> None:
        with Runtime(bundle_copy) as runtime:
            before = runtime.route(KNOWN["sql"]).probabilities
            runtime.add_adapter("parrot", parrot, examples=PARROT)
            after = runtime.route(KNOWN["sql"]).probabilities
        assert after["sql"] / after["sums"] == pytest.approx(before["sql"] / before["sums"])

    def test_text_of_a_removed_skill_goes_to_the_base_model(self, bundle_copy: Path) -> None:
        with Runtime(bundle_copy) as runtime:
            assert runtime.route(KNOWN["sums"]).selected == ("sums",)
            runtime.remove_adapter("sums")
            for _ in range(2):
                decision = runtime.route(KNOWN["sums"])
                assert decision.selected == ()
                assert decision.doubt > 0.75
                assert top(runtime, KNOWN["sql"]) == "sql"
                runtime.close()
                runtime = Runtime(bundle_copy)
            runtime.close()

    def test_all_adapters_can_go(self, bundle_copy: Path) -> None:
        with Runtime(bundle_copy) as runtime:
            for name in KNOWN:
                runtime.remove_adapter(name)
            assert runtime.adapters == ()
        with Runtime(bundle_copy) as again:
            assert again.generate("Hello", max_new_tokens=3).sentences[0].fusion == {}

    def test_a_stream_that_has_begun_keeps_its_adapters(
        self, bundle_copy: Path, tiny_adapters: dict[str, Path]
    ) -> None:
        with Runtime(bundle_copy) as runtime:
            whole = runtime.generate("Hello", adapters="sql", max_new_tokens=8).text
            stream = runtime.stream("Hello", adapters="sql", max_new_tokens=8)
            runtime.remove_adapter("sql")
            assert "".join(chunk.text for chunk in stream) == whole


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "kind", "cause"),
        [
            ({"name": "sql"}, UsageError, "has an adapter 'sql' already"),
            ({"name": "a b"}, AdapterError, "not a valid adapter name"),
            ({"peft_dir": "nowhere"}, AdapterError, "cannot be read"),
            ({"examples": "one text"}, UsageError, "not a list"),
            ({"examples": PARROT[:2]}, UsageError, "2 examples"),
            ({"examples": [*PARROT, ""]}, RouterError, "example 21 has no text"),
            ({"examples": [*PARROT, 5]}, RouterError, "example 21 is not a JSON object"),
            ({"examples": [*PARROT, "x" * 1_000_001]}, RouterError, "1,000,001 characters"),
        ],
    )
    def test_nothing_changes(
        self,
        bundle_copy: Path,
        parrot: Path,
        arguments: dict[str, Any],
        kind: type[DlpEdgeError],
        cause: str,
    ) -> None:
        before = contents(bundle_copy)
        with Runtime(bundle_copy) as runtime:
            with pytest.raises(kind, match=cause):
                runtime.add_adapter(**{"name": "parrot", "peft_dir": parrot, **arguments})
            assert len(runtime.adapters) == 3
        assert contents(bundle_copy) == before

    def test_an_adapter_without_a_slot(
        self,
        tiny_backbone: Path,
        tiny_adapters: dict[str, Path],
        tmp_path: Path,
    ) -> None:
        from dlp_edge.export.pipeline import export_bundle

        bundle = tmp_path / "small"
        few = {"sums": tiny_adapters["sums"]}
        export_bundle(str(tiny_backbone), few, None, bundle, quantisation="fp32")
        with Runtime(bundle) as runtime:
            with pytest.raises(AdapterError, match="no slot for it") as caught:
                runtime.add_adapter("sql", tiny_adapters["sql"])
            assert "Export the bundle again" in caught.value.remedy
            with pytest.raises(UsageError, match="no router to train"):
                runtime.add_adapter(
                    "more", make_adapter(tiny_backbone, tmp_path / "more", r=2), examples=PARROT
                )

    def test_the_same_weights_under_another_name(
        self, bundle_copy: Path, tiny_adapters: dict[str, Path]
    ) -> None:
        with (
            Runtime(bundle_copy) as runtime,
            pytest.raises(AdapterError, match="sql and twin have the same weights"),
        ):
            runtime.add_adapter("twin", tiny_adapters["sql"])

    def test_an_unknown_adapter_is_not_removed(self, bundle_copy: Path) -> None:
        with Runtime(bundle_copy) as runtime, pytest.raises(UsageError, match="no adapter 'x'"):
            runtime.remove_adapter("x")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.slow
class TestEdition:
    def test_old_files_go_and_the_backbone_is_not_touched(
        self, bundle_copy: Path, parrot: Path
    ) -> None:
        backbone = (bundle_copy / "backbone.onnx.data").stat()
        with Runtime(bundle_copy) as runtime:
            runtime.add_adapter("parrot", parrot, examples=PARROT)
            runtime.remove_adapter("parrot")
        names = {path.name for path in bundle_copy.iterdir()}
        assert {"adapters.2.safetensors", "router_head.2.safetensors"} <= names
        assert not {"adapters.safetensors", "adapters.1.safetensors"} & names
        assert names == {*open_bundle(bundle_copy).manifest.files, "manifest.json"}
        after = (bundle_copy / "backbone.onnx.data").stat()
        assert (after.st_ino, after.st_mtime_ns) == (backbone.st_ino, backbone.st_mtime_ns)

    @pytest.mark.parametrize("fails_at", range(3))
    def test_a_full_disk_changes_nothing(
        self, bundle_copy: Path, parrot: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
    ) -> None:
        before = contents(bundle_copy)
        calls: list[Path] = []

        def write(path: Path, data: bytes) -> None:
            calls.append(path)
            path.write_bytes(data[:10])
            if len(calls) > fails_at:
                raise OSError(28, "No space left on device")
            path.write_bytes(data)

        monkeypatch.setattr("dlp_edge.bundle.edition.write_file", write)
        with Runtime(bundle_copy) as runtime, pytest.raises(ResourceError, match="is full"):
            runtime.add_adapter("parrot", parrot, examples=PARROT)
        assert contents(bundle_copy) == before

    @pytest.mark.parametrize("killed_at", range(4))
    def test_a_killed_process_leaves_a_whole_bundle(
        self, bundle_copy: Path, parrot: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
    ) -> None:
        """Killed after each file, and after the manifest but before the old files go."""

        class Killed(BaseException):
            pass

        count = 0

        def die(*_: object) -> None:
            nonlocal count
            count += 1
            if count > killed_at:
                raise Killed

        from dlp_edge.bundle import edition

        write, clean = edition.write_file, edition._remove_other_editions
        monkeypatch.setattr(edition, "write_file", lambda *a: (die(), write(*a)))
        monkeypatch.setattr(edition, "_remove_other_editions", lambda *a: (die(), clean(*a)))
        with Runtime(bundle_copy) as runtime, pytest.raises(Killed):
            runtime.add_adapter("parrot", parrot, examples=PARROT)
        monkeypatch.undo()
        with Runtime(bundle_copy) as runtime:
            assert len(runtime.adapters) == (4 if killed_at == 3 else 3)
            assert top(runtime, KNOWN["sql"]) == "sql"
            runtime.remove_adapter("sums")  # and the next edition clears up
        names = {path.name for path in bundle_copy.iterdir()} - {"manifest.json.next"}
        assert names == {*open_bundle(bundle_copy).manifest.files, "manifest.json"}

    def test_a_bundle_that_was_changed_meanwhile_is_not_overwritten(
        self, bundle_copy: Path, parrot: Path
    ) -> None:
        with Runtime(bundle_copy) as first, Runtime(bundle_copy) as second:
            first.remove_adapter("email")
            with pytest.raises(BundleError, match="changed after it was loaded"):
                second.add_adapter("parrot", parrot)
            assert len(second.adapters) == 3

    def test_two_writers_do_not_meet(self, bundle_copy: Path) -> None:
        from dlp_edge.atomic.lock import locked

        bundle = open_bundle(bundle_copy)
        with locked(bundle_copy), pytest.raises(ResourceError, match="another process"):
            write_edition(bundle, bundle.manifest, {})

    @pytest.mark.parametrize(
        ("damage", "cause"),
        [
            (lambda path: path.unlink(), "is missing"),
            (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"), "has been changed"),
        ],
    )
    def test_a_damaged_last_layer_is_refused(
        self, bundle_copy: Path, damage: Callable[[Path], object], cause: str
    ) -> None:
        damage(bundle_copy / "router_head.safetensors")
        with pytest.raises(BundleError, match=cause):
            Runtime(bundle_copy)


class TestHead:
    @given(rows=st.integers(2, 6), kept=st.integers(1, 20), seed=st.integers(0, 99))
    @settings(max_examples=30)
    def test_rows_come_and_go_without_touching_the_others(
        self, rows: int, kept: int, seed: int
    ) -> None:
        rng = np.random.default_rng(seed)
        head = some_head(rng, rows, kept)
        assert equal(head_from_bytes(head_to_bytes(head)), head)
        x = rng.normal(size=(3, 5)).astype(np.float32)
        at = int(rng.integers(rows + 1))
        weight, features = rng.normal(size=5), rng.normal(size=(2, 5))
        more = head.with_row(at, weight.astype(np.float32), 0.5, features.astype(np.float16))
        np.testing.assert_allclose(np.delete(more.scores(x), at, 1), head.scores(x))
        assert (more.rows[-2:] == at).all()
        less = more.disowned(at)
        np.testing.assert_allclose(less.scores(x)[:, -1], more.scores(x)[:, at])
        np.testing.assert_allclose(less.scores(x)[:, :-1], head.scores(x))
        assert (less.rows[:kept] == head.rows).all()
        assert (less.rows[kept:] == rows).all()

    @pytest.mark.parametrize(
        ("changes", "cause"),
        [
            ({"bias": np.zeros(3, np.float32)}, "do not fit"),
            ({"weight": np.zeros((0, 5), np.float32)}, "do not fit"),
            ({"rows": np.zeros(1, np.int64)}, "do not fit"),
            ({"bias": np.full(4, np.nan, np.float32)}, "not finite"),
            ({"rows": np.full(6, 4, np.int64)}, "features of no row"),
        ],
    )
    def test_refuses_tensors_that_do_not_fit(self, changes: dict[str, Any], cause: str) -> None:
        head = some_head(np.random.default_rng(0), 4, 6)
        with pytest.raises(RouterError, match=cause):
            RouterHead(**{**vars(head), **changes})

    def test_refuses_bytes_that_are_no_head(self) -> None:
        from safetensors.numpy import save

        with pytest.raises(RouterError, match="cannot be read"):
            head_from_bytes(b"x" * 40)
        with pytest.raises(RouterError, match="holds"):
            head_from_bytes(save({"weight": np.zeros((2, 2), np.float32)}))

    @given(seed=st.integers(0, 50), count=st.integers(5, 40))
    @settings(max_examples=20, deadline=None)
    def test_a_separable_skill_is_learned_and_the_others_stay(self, seed: int, count: int) -> None:
        """Five old skills and a new one, each around its own direction."""
        rng = np.random.default_rng(seed)
        centres = np.eye(6, 16) * 6
        old = np.repeat(centres[:5], 30, 0) + rng.normal(size=(150, 16)) * 0.7
        rows = np.repeat(np.arange(5), 30)
        head = RouterHead(
            centres[:5].astype(np.float32),
            np.zeros(5, np.float32),
            old.astype(np.float16),
            rows,
        )
        new = (centres[5] + rng.normal(size=(count, 16)) * 0.7).astype(np.float32)
        weight, bias = fit_row(head, new, 1.0, np.ones(16, np.bool_))
        after = head.with_row(5, weight, bias, new.astype(np.float16))
        unseen = (centres[5] + rng.normal(size=(50, 16)) * 0.7).astype(np.float32)
        assert (after.scores(unseen).argmax(1) == 5).mean() > 0.95
        assert (after.scores(old.astype(np.float32)).argmax(1) == rows).mean() > 0.98

    def test_a_row_is_fitted_on_what_trained_rows_do_not_read(self) -> None:
        """The trained rows see nothing of the new skill: it differs in other features only."""
        rng = np.random.default_rng(0)
        seen = rng.normal(size=(80, 4)) + np.repeat(np.eye(2, 4) * 8, 40, 0)
        rows = np.repeat(np.arange(2), 40)
        old = np.concatenate([seen, rng.normal(size=(80, 4))], 1).astype(np.float32)
        weight = np.concatenate([np.eye(2, 4) + 0.01, np.zeros((2, 4))], 1).astype(np.float32)
        head = RouterHead(weight, np.zeros(2, np.float32), old.astype(np.float16), rows)
        new = old[:40].copy()
        new[:, 5] += 8
        read = fit_router_row._unused_features(head, 1)
        assert read.tolist() == [False] * 4 + [True] * 4
        row, bias = fit_row(head, new[:20], 1.0, read)
        after = head.with_row(2, row, bias, new[:20].astype(np.float16))
        assert not row[:4].any()
        assert (after.scores(new[20:]).argmax(1) == 2).mean() > 0.9
        assert (after.scores(old).argmax(1) == rows).mean() > 0.95
        assert (
            fit_router_row._unused_features(after, 1).tolist() == read.tolist()
        )  # the next one reads the same
        whole = RouterHead(np.ones((2, 8), np.float32), head.bias, head.features, rows)
        assert fit_router_row._unused_features(whole, 1).all()


def some_head(rng: np.random.Generator, rows: int, kept: int) -> RouterHead:
    return RouterHead(
        rng.normal(size=(rows, 5)).astype(np.float32),
        rng.normal(size=rows).astype(np.float32),
        rng.normal(size=(kept, 5)).astype(np.float16),
        rng.integers(0, rows, kept),
    )


def equal(a: RouterHead, b: RouterHead) -> bool:
    return all(np.array_equal(vars(a)[name], vars(b)[name]) for name in vars(a))


@pytest.mark.slow
class TestCommandLine:
    def test_add_and_remove(
        self,
        bundle_copy: Path,
        parrot: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        examples = tmp_path / "examples.jsonl"
        examples.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PARROT))
        words = ["add", str(bundle_copy), f"parrot={parrot}", "--json"]
        assert main([*words, "--examples", str(examples)]) == 0
        document = json.loads(capsys.readouterr().out)
        assert (document["added"], document["routed"]) == ("parrot", True)
        assert main(["route", str(bundle_copy), "Repeat after me the word cloud", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["selected"] == ["parrot"]
        assert main(["remove", str(bundle_copy), "parrot", "--json"]) == 0
        assert "parrot" not in json.loads(capsys.readouterr().out)["adapters"]
        assert main(words) == 0
        assert "never routed to" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("words", "code"),
        [
            (["add", "BUNDLE", "parrot"], 2),
            (["add", "BUNDLE", "parrot=NOWHERE"], 3),
            (["add", "BUNDLE", "parrot=NOWHERE", "--examples", "NOWHERE"], 3),
            (["add", "NOWHERE", "parrot=x"], 3),
            (["remove", "BUNDLE", "x"], 2),
            (["remove", "NOWHERE", "x"], 3),
        ],
    )
    def test_exit_codes(
        self,
        tiny_bundle: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        words: list[str],
        code: int,
    ) -> None:
        places = {"BUNDLE": str(tiny_bundle), "NOWHERE": str(tmp_path / "no")}
        for name, place in places.items():
            words = [word.replace(name, place) for word in words]
        assert main(words) == code
        assert capsys.readouterr().err.startswith("error: ")

    def test_adding_needs_no_torch(self, bundle_copy: Path, parrot: Path) -> None:
        code = (
            "import sys\n"
            "for name in ('torch', 'transformers', 'peft', 'onnx'): sys.modules[name] = None\n"
            "from dlp_edge import Runtime\n"
            f"with Runtime({str(bundle_copy)!r}) as rt:\n"
            f"    rt.add_adapter('parrot', {str(parrot)!r}, examples={PARROT!r})\n"
            "    print(rt.route('Repeat after me the word cloud').selected)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.strip() == "('parrot',)", done.stderr


@pytest.mark.slow
def test_bfloat16_adapters_are_read_without_torch(
    bundle_copy: Path, parrot: Path, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    from dlp_edge.bundle.peft_reader import read_adapter
    from dlp_edge.runtime.adapters.edit import _slot_sizes

    short = Path(shutil.copytree(parrot, tmp_path / "short"))
    tensors = load_file(parrot / "adapter_model.safetensors")
    halves = {key: tensor.to(torch.bfloat16) for key, tensor in tensors.items()}
    save_file(halves, short / "adapter_model.safetensors")
    found = read_adapter("short", short, _slot_sizes(open_bundle(bundle_copy).manifest))
    for key, tensor in halves.items():
        if key.endswith("lora_A.weight"):
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            assert np.array_equal(found.pairs[module].a, tensor.float().numpy())
