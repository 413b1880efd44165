"""Methods side by side on one model: every method at every ratio, as `compress` would make it, one table."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .allocate import TooSmall
from .baseline import Baseline
from .contrast import Measurement
from .errors import UserError
from .evaluation import Evaluation
from .files import differences, file_digest, locked, read_json, write_json
from .identity import FACTORS, SourceRecord, maths_version, structure_digest
from .progress import Progress, silent
from .run_folder import RunFolder
from .size import Size
from .stages import Recipe, Run
from .streaming import StreamedModel, default_device


@dataclass(frozen=True)
class Contender:
    """A method with options, under the label that tables show."""

    label: str
    method: str
    options: dict


def compare(
    model: str, contenders: list[Contender], ratios: list[float], output: str | Path, *, texts: Sequence[str | None],
    calibration: str | None = None, own_text: float | None = None, samples: int = 256, seqlen: int | None = None,
    seed: int = 0, window: int | None = None, max_windows: int | None = None, device: str | None = None,
    dtype: str = "auto", keep: bool = False, text_column: str | None = None, trust_remote_code: bool = False,
    progress: Progress = silent,
    on_row: Callable[[dict], None] = lambda row: None,
) -> list[dict]:  # fmt: skip
    """Compresses and measures; returns (and writes to OUTPUT/results.json after each) one row a run, the dense first.

    Of each compressed model also its mean divergence from the dense one, nats a token, and how often both find the same
    next token the likeliest (`kl`, `agreement`, see contrast.Contrast); what the dense one says is kept in
    OUTPUT/baseline.safetensors.
    A stopped comparison goes on where it was. A ratio that a method can't reach gives a row that says why.

    Args:
        texts: to measure on, see evaluate.
        own_text: share of the calibration windows that the model writes itself, the same for every method; None for
            each method's own, which is what `compress` does.
        keep: leave the compressed models in OUTPUT/models.
        text_column: of .jsonl, .parquet and datasets, to calibrate and to measure on.
        trust_remote_code: whether code from the model's repository may run, for what transformers lacks.
        on_row: called with every row, also those that were there already.
    """
    output = Path(output).expanduser()
    for ratio in ratios:
        Size.of(ratio)
    recipes = {c.label: Recipe.of(c.method, c.options, samples=samples, seed=seed) for c in contenders}
    if len(recipes) < len(contenders):
        raise UserError("Two contenders have one label; results could not be told apart.")
    streamed = StreamedModel(model, device or default_device(), trust_remote_code=trust_remote_code)
    with locked(output / ".lock", str(output)):
        runs = _Runs(streamed, output, calibration, own_text, text_column, seqlen, progress)
        about = {
            "model": model, "source": structure_digest(streamed.reader.checkpoint),
            "calibration": calibration, "own_text": own_text, "samples": samples, "seqlen": seqlen, "seed": seed,
            "texts": [[text, content_digest(text)] for text in texts], "window": window,
            "max_windows": max_windows, "dtype": dtype, "text_column": text_column,
        }  # fmt: skip
        rows = _Rows(output / "results.json", about, on_row)

        how = Measurement(
            tuple(texts), window=window, max_windows=max_windows, device=device, dtype=dtype, text_column=text_column,
            trust_remote_code=trust_remote_code, progress=progress,
        )  # fmt: skip

        def dense() -> Baseline:
            return how.baseline(model, model, output / "baseline.safetensors")

        def measured(name: str) -> dict:
            found = how.contrast(name, dense())
            return {**figures(found.model), "kl": found.overall.kl.value, "agreement": found.overall.agreement.value}

        seen = SourceRecord(output / "source.json", streamed.reader.checkpoint, model)
        rows.once("dense", 0.0, {}, lambda: figures(Evaluation(**dense().dense)))
        seen.saw(list(streamed.reader.checkpoint.files))  # all of it has just been read, or was when the row was made
        runs.calibrate(list(recipes.values()))
        for ratio in ratios:
            for label, recipe in recipes.items():
                folder = output / "models" / f"{_slug(label)}-{ratio}"

                def row(folder: Path = folder, recipe: Recipe = recipe, ratio: float = ratio) -> dict:
                    started = time.perf_counter()
                    try:
                        runs.make(recipe, ratio, folder)
                    except TooSmall as error:  # the ratio can't be reached; what else is wrong stops the comparison
                        return {"error": str(error)}
                    made = {"seconds": time.perf_counter() - started, **measured(str(folder))}
                    if not keep:
                        remove(folder)
                    return made

                made_by = {
                    "method": recipe.method.name, "options": recipe.options, "maths": maths_version(*FACTORS),
                    "text": runs.text_digest(recipe),
                }  # fmt: skip
                rows.once(label, ratio, made_by, row)
        return rows.finish()


def figures(found: Evaluation) -> dict:
    return {**asdict(found), "mean_perplexity": found.mean_perplexity}


def remove(folder: Path) -> None:
    """Renamed first: what a kill leaves half removed is not taken for a folder of somebody else's."""
    gone = folder.with_name(folder.name + ".removed")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone)


def content_digest(text: str | None) -> str | None:
    """Of a file to measure on; None for what has a name alone."""
    path = Path(text).expanduser() if text else None
    return file_digest(path)[:32] if path is not None and path.is_file() else None


class _Runs:
    """One calibration for all methods that read the same text."""

    def __init__(
        self, model: StreamedModel, output: Path, calibration: str | None, own_text: float | None,
        text_column: str | None, seqlen: int | None, progress: Progress,
    ):  # fmt: skip
        self.model, self.output, self.progress = model, output, progress
        self.seen = output / "source.json"
        self.text: dict[str, Any] = {
            "calibration": calibration, "own_text": own_text, "text_column": text_column, "seqlen": seqlen,
        }  # fmt: skip
        self.shared: dict[float, Run] = {}  # share of own text -> a run whose text and statistics serve all

    def text_digest(self, recipe: Recipe) -> str | None:
        """Of the tokens that a method is calibrated on."""
        text = self.shared[self._share(recipe)].text if recipe.reads_text else None
        return None if text is None else text.description["sha256"]

    def calibrate(self, recipes: list[Recipe]) -> None:
        """What any of them needs of the dense model, at once."""
        needs: dict[float, set[str]] = {}
        for recipe in recipes:
            if recipe.reads_text:
                share = self._share(recipe)
                needs.setdefault(share, set()).update(recipe.statistics)
        for share, statistics in needs.items():
            self.shared[share].calibrate(statistics)

    def make(self, recipe: Recipe, ratio: float, folder: Path) -> None:
        """The compressed folder; one that a stopped comparison left unmeasured is made again."""
        shared = self.shared[self._share(recipe)] if recipe.reads_text else None
        if folder.exists():
            if not (folder / "compression.json").is_file():
                raise UserError(f"{folder}: exists already, and is not a model that moefactor made. Remove it.")
            remove(folder)
        calibrated = None if shared is None else shared.folder
        stages = RunFolder(folder.with_name(folder.name + ".run"), calibrated=calibrated, seen=self.seen)
        run = Run(self.model, replace(recipe, size=Size.of(ratio)), stages, self.progress)
        if shared is not None:
            vars(run)["text"] = shared.text  # read once
        try:
            run.all(folder)
        except KeyboardInterrupt:
            raise  # what is there is gone on from
        except BaseException:
            shutil.rmtree(stages.folder, ignore_errors=True)
            raise
        shutil.rmtree(stages.folder, ignore_errors=True)

    def _share(self, recipe: Recipe) -> float:
        recipe = replace(recipe, **self.text)
        share = Run(self.model, recipe, RunFolder(self.output)).own_share
        if share not in self.shared:
            name = f"calibration-own-{share}" if share else "calibration"
            folder = RunFolder(self.output / name, seen=self.seen)
            self.shared[share] = Run(self.model, recipe, folder, self.progress)
        return share


class _Rows:
    """results.json: what was asked, and the rows that are there."""

    def __init__(self, path: Path, about: dict, on_row: Callable[[dict], None]):
        self.path, self.about, self.on_row = path, about, on_row
        self.rows: list[dict] = []
        data = read_json(path)
        if data is not None:
            found = differences(about, data.get("about"))
            if found:
                raise UserError(
                    f"{path}: holds another comparison ({'; '.join(found[:3])}). Choose another output, or remove "
                    f"{path.parent}."
                )
            self.rows = data.get("rows") or []
            if not all(isinstance(row, dict) and {"label", "ratio", "made_by"} <= row.keys() for row in self.rows):
                raise UserError(f"{path}: not what moefactor writes there. Remove {path.parent}.")

    def once(self, label: str, ratio: float, made_by: dict, run: Callable[[], dict]) -> None:
        row = next((r for r in self.rows if r["label"] == label and r["ratio"] == ratio), None)
        if row is None:
            row = {"label": label, "ratio": ratio, "made_by": made_by, **run()}
            self.rows.append(row)
            self._write()
        elif found := "; ".join(differences(made_by, row["made_by"])[:3]):
            raise UserError(
                f"{self.path}: has a row {label!r} that was made otherwise ({found}). Choose another output."
            )
        self.on_row(row)

    def finish(self) -> list[dict]:
        mark_front(self.rows)
        self._write()
        return self.rows

    def _write(self) -> None:
        write_json(self.path, {"about": self.about, "rows": self.rows})


def mark_front(rows: list[dict]) -> None:
    """Sets `front` where no other row is at least as good in both parameters and mean perplexity."""
    for row in rows:
        if "error" in row:
            row["front"] = False
            continue
        size, loss = row["parameters"], row["mean_perplexity"]
        row["front"] = not any(
            "error" not in other
            and other["parameters"] <= size
            and other["mean_perplexity"] <= loss
            and (other["parameters"], other["mean_perplexity"]) != (size, loss)
            for other in rows
        )


def _slug(label: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in label).strip("-")
