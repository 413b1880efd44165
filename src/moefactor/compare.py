"""Methods side by side on one model: one calibration, every method at every ratio, one table."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from .calibrate import Calibration, calibrate
from .checkpoint import write_atomically
from .compress import needs_text, run_stages, upfront_needs
from .errors import UserError
from .evaluate import evaluate
from .methods import get
from .planning import check_ratio
from .progress import Progress, silent
from .run_folder import RunFolder
from .streaming import StreamedModel, default_device


@dataclass(frozen=True)
class Contender:
    """A method with options, under the label that tables show."""

    label: str
    method: str
    options: dict


def compare(
    model: str, contenders: list[Contender], ratios: list[float], output: str | Path, *, texts: list[str | None],
    calibration: str | None = None, samples: int = 256, seqlen: int | None = None, seed: int = 0,
    window: int | None = None, max_windows: int | None = None, device: str | None = None, dtype: str = "auto",
    keep: bool = False, text_column: str | None = None, trust_remote_code: bool = False, progress: Progress = silent,
    on_row: Callable[[dict], None] = lambda row: None,
) -> list[dict]:  # fmt: skip
    """Compresses and measures; returns (and writes to OUTPUT/results.json after each) one row a run, the dense first.

    A stopped comparison goes on where it was. A ratio that a method can't reach gives a row that says why.

    Args:
        texts: to measure on, see evaluate.
        keep: leave the compressed models in OUTPUT/models.
        text_column: of .jsonl, .parquet and datasets, to calibrate and to measure on.
        trust_remote_code: whether code from the model's repository may run, for what transformers lacks.
        on_row: called with every row, also those that were there already.
    """
    output = Path(output).expanduser()
    for ratio in ratios:
        check_ratio(ratio)
    chosen = [(c, get(c.method), get(c.method).complete(c.options)) for c in contenders]
    streamed = StreamedModel(model, device or default_device(), trust_remote_code=trust_remote_code)
    text = None
    if any(needs_text(method, options) for _, method, options in chosen):
        text = Calibration.read(
            streamed, calibration, samples=samples, seqlen=seqlen, seed=seed, text_column=text_column
        )
    about = {
        "model": model, "calibration": text and text.description, "texts": texts, "window": window,
        "max_windows": max_windows, "dtype": dtype, "text_column": text_column,
    }  # fmt: skip
    rows = _Rows(output / "results.json", about, on_row)
    shared = RunFolder(output / "calibration")
    needs = set().union(*(upfront_needs(method, options, sequential=True) for _, method, options in chosen))
    if needs:
        calibrate(streamed, shared, text, needs, progress=progress)

    def measured(name: str) -> dict:
        result = evaluate(
            name, texts, window=window, max_windows=max_windows, device=device, dtype=dtype, text_column=text_column,
            trust_remote_code=trust_remote_code, progress=progress,
        )  # fmt: skip
        return {**asdict(result), "mean_perplexity": result.mean_perplexity}

    rows.once("dense", 0.0, lambda: measured(model))
    for ratio in ratios:
        for contender, method, options in chosen:
            folder = output / "models" / f"{_slug(contender.label)}-{ratio}"

            def run(folder: Path = folder, method=method, options=options, ratio: float = ratio) -> dict:
                started = time.perf_counter()
                if not folder.exists():
                    stages = RunFolder(folder.with_name(folder.name + ".run"), calibrated=shared)
                    try:
                        run_stages(
                            streamed, method, options, ratio, folder, stages, text=text, seed=seed, progress=progress
                        )
                    except UserError as error:
                        return {"error": str(error)}
                    finally:
                        shutil.rmtree(stages.folder, ignore_errors=True)
                row = {"seconds": time.perf_counter() - started, **measured(str(folder))}
                if not keep:
                    shutil.rmtree(folder)
                return row

            rows.once(contender.label, ratio, run)
    return rows.finish()


class _Rows:
    """results.json: what was asked, and the rows that are there."""

    def __init__(self, path: Path, about: dict, on_row: Callable[[dict], None]):
        self.path, self.about, self.on_row = path, about, on_row
        self.rows: list[dict] = []
        if path.is_file():
            try:
                data = json.loads(path.read_text())
            except json.JSONDecodeError as error:
                raise UserError(f"{path}: not valid JSON at line {error.lineno}: {error.msg}. Remove it.") from None
            if data.get("about") != about:
                raise UserError(f"{path}: holds another comparison. Choose another output, or remove it.")
            self.rows = data["rows"]

    def once(self, label: str, ratio: float, run: Callable[[], dict]) -> None:
        row = next((r for r in self.rows if r["label"] == label and r["ratio"] == ratio), None)
        if row is None:
            row = {"label": label, "ratio": ratio, **run()}
            self.rows.append(row)
            self._write()
        self.on_row(row)

    def finish(self) -> list[dict]:
        mark_front(self.rows)
        self._write()
        return self.rows

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"about": self.about, "rows": self.rows}, indent=1)
        write_atomically(self.path, (content + "\n").encode())


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
