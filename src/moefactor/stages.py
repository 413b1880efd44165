"""The stages of a run in one place: what each needs, reads and writes, in which order, and what makes it the same run.

| stage | needs | writes |
|---|---|---|
| calibrate | the text; the whole model, a layer at a time | RUN/calibration.json, RUN/stats |
| plan | the experts' weights; statistics, where the method plans by them | RUN/plan.json |
| factorise | the plan; statistics or the text; weights | RUN/layers, RUN/journal.json |
| write | the journal's layers; the rest of the weights | the checkpoint |

`compress`, `compare` and the command line call these and repeat none of it. Every stage can be run alone and again; a
killed one goes on where it was; each refuses what belongs to other weights, options, text or mathematics.
"""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Callable, Set
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from .calibrate import Calibration, calibrate, own_share
from .coverage import Coverage, coverage, unreached
from .errors import UserError, required
from .factorise import factorise
from .methods import Method, get
from .plan import Plan
from .planning import budget_of, make_plan
from .prediction import Prediction
from .progress import Progress, silent
from .rest import check_bits
from .run_folder import RunFolder
from .size import Size
from .stats import GRADIENTS
from .streaming import StreamedModel
from .write import check_method, write_checkpoint


@dataclass(frozen=True)
class Recipe:
    """A method and everything that decides what it makes of a model, checked.

    Args:
        options: the method's own, complete.
        size: how large the result may be; None before planning.
        sequential: calibrate each layer on what the factorised layers before it give.
        allocation, rank_multiple: see make_plan.
        calibration: text file, folder or dataset, see Calibration.read.
        own_text: share of it that the model writes itself; None for the method's own.
        text_column: of .jsonl, .parquet and datasets.
        drop_mtp: leave out layers of multi-token prediction, and let config.json say that there are none.
        heal: steps of healing that follow, which read the text too.
        rest_bits: of the matrices that are not a compressed expert's: 16, as they are, 8 or 4.
    """

    method: Method
    options: dict
    size: Size | None = None
    sequential: bool = True
    allocation: str | None = None
    rank_multiple: int | None = None
    calibration: str | None = None
    own_text: float | None = None
    samples: int = 256
    seqlen: int | None = None
    seed: int = 0
    text_column: str | None = None
    drop_mtp: bool = False
    heal: int = 0
    rest_bits: int = 16

    @classmethod
    def of(cls, method: str, options: dict, *, ratio: float | None = None, **rest: Any) -> Recipe:
        """`ratio` for a size that is one. Raises UserError for a method or an option that there is not."""
        chosen = get(method)
        if ratio is not None:
            rest["size"] = Size.of(ratio)
        return cls(chosen, chosen.complete(options), **rest)

    @property
    def reads_text(self) -> bool:
        return bool(self.method.plan_needs(self.options) or self.method.factorise_needs(self.options))

    def check(self) -> None:
        """Raises UserError for options that the method does not read."""
        self.method.needs_to_plan(self.options, self.allocation)
        if not self.sequential and self.size is not None and not self.method.factorise_needs(self.options):
            raise UserError(
                f"{self.method.name} factorises without statistics with these options; leave --no-sequential out."
            )
        mixed = self.size is not None and self.size.bits == 0
        if mixed and self.method.rounds(self.options) != "mixed":
            raise UserError(
                f"{self.method.name} with these options has one number of bits for all: say how many, --bits 4. "
                "Each channel its own is for biaxial --form fast, without --latent and --channel-share."
            )
        given = {
            "calibration": self.calibration, "own-text": self.own_text or None, "seqlen": self.seqlen,
            "text-column": self.text_column,
        }  # fmt: skip
        for option, value in given.items():
            if value is not None and not self.reads_text and not self.heal:
                raise UserError(f"{self.method.name} reads no text with these options; leave --{option} out.")

    @property
    def all_statistics(self) -> set[str]:
        """Those that any stage reads, one on the dense model, the other on what is left of it."""
        return self.method.needs_to_plan(self.options, self.allocation) | self.method.factorise_needs(self.options)

    @property
    def statistics(self) -> set[str]:
        """Those of the dense model that must be there before planning and factorising."""
        later = self.method.factorise_needs(self.options)
        if self.sequential:
            later = later & GRADIENTS
        return self.method.needs_to_plan(self.options, self.allocation) | later


@dataclass(frozen=True)
class Run:
    """A recipe at work on a model, in a run folder."""

    model: StreamedModel
    recipe: Recipe
    folder: RunFolder
    progress: Progress = silent
    on_coverage: Callable[[list[Coverage]], None] = lambda rows: None

    def check(self) -> None:
        """Raises UserError for what can be known to be wrong before anything is read."""
        recipe = self.recipe
        check_bits(recipe.rest_bits)
        if recipe.size is not None:
            budget_of(self.model, recipe.size, recipe.allocation, recipe.rank_multiple, recipe.rest_bits, self.left_out)
        recipe.check()
        check_method(
            self.model, recipe.method, recipe.options, drop_mtp=recipe.drop_mtp, rest_bits=self.rest_bits
        )  # fmt: skip

    @property
    def rest_bits(self) -> int:
        """Of the rest as it is written here: an ordinary checkpoint is quantised afterwards, with its rest."""
        size, ordinary = self.recipe.size, self.recipe.method.standard(self.recipe.options)
        return 16 if ordinary and size is not None and size.bits else self.recipe.rest_bits

    @property
    def left_out(self) -> Set[str]:
        """Names on disk of what is not written."""
        return Prediction.of(self.model).names if self.recipe.drop_mtp else frozenset()

    @cached_property
    def own_share(self) -> float:
        """Share of the windows that the model writes itself; none for a method that reads no text."""
        recipe = self.recipe
        if not recipe.reads_text:
            return 0.0
        return own_share(recipe.method, self.model, recipe.own_text, recipe.calibration)

    @cached_property
    def text(self) -> Calibration | None:
        """The calibration text, read once; None for a method that reads none."""
        recipe = self.recipe
        if not recipe.reads_text:
            return None
        with self.folder.opened(self.model):  # where what the model writes is kept
            return Calibration.read(
                self.model, recipe.calibration, samples=recipe.samples, seqlen=recipe.seqlen, seed=recipe.seed,
                own=self.own_share, text_column=recipe.text_column, kept=self.folder.own_text, progress=self.progress,
            )  # fmt: skip

    def calibrate(self, statistics: set[str] | None = None) -> None:
        """`statistics`: which to collect; None for those that the recipe needs. None are needed: nothing is done."""
        needs = self.recipe.statistics if statistics is None else statistics
        if needs and self.text is not None:
            calibrate(self.model, self.folder, self.text, needs, progress=self.progress)
            self._tell({
                layer.decoder_layer: self.folder.counts(index) for index, layer in enumerate(self.model.experts)
            })  # fmt: skip

    def _tell(self, counts: dict[str, Tensor]) -> None:
        """How many tokens each expert saw; a warning names those that saw none."""
        rows = coverage(counts)
        self.on_coverage(rows)
        gaps = unreached(rows)
        if gaps:
            warnings.warn(gaps, stacklevel=2)

    def plan(self) -> Plan:
        recipe = self.recipe
        return make_plan(
            self.model, recipe.method, recipe.options, required(recipe.size, "a size"), run=self.folder,
            allocation=recipe.allocation, rank_multiple=recipe.rank_multiple, rest_bits=recipe.rest_bits,
            without=self.left_out, seed=recipe.seed, progress=self.progress,
        )  # fmt: skip

    def factorise(self, plan: Plan) -> None:
        text = self.text if self.recipe.sequential and self.recipe.method.factorise_needs(self.recipe.options) else None
        seen: dict[str, Tensor] = {}
        factorise(
            self.model, plan, self.recipe.method, self.folder, calibration=text, sequential=self.recipe.sequential,
            progress=self.progress, seen=seen,
        )  # fmt: skip
        if seen and not self.recipe.statistics:  # else calibration has told
            self._tell(seen)

    def write(self, plan: Plan, output: Path, command: str | None = None) -> None:
        with self.folder.opened(self.model):
            write_checkpoint(
                self.model, plan, self.folder, output, command or self.command(output),
                drop_mtp=self.recipe.drop_mtp, rest_bits=self.rest_bits,
            )  # fmt: skip

    def all(self, output: Path) -> Plan:
        """The stages in order."""
        self.check()
        with self.folder.opened(self.model):
            self.calibrate()
            plan = self.plan()
            self.folder.write_plan(plan)
            self.factorise(plan)
            self.write(plan, output)
        return plan

    def command(self, output: Path) -> str:
        """What was typed, or could have been."""
        recipe = self.recipe
        start = (
            f"moefactor compress {shlex.quote(self.model.name)} --method {recipe.method.name} "
            f"{required(recipe.size, 'a size').told()}"
        )
        rest = "" if recipe.rest_bits == 16 else f" --rest-bits {recipe.rest_bits}"
        return f"{start}{rest} -o {shlex.quote(output.name)}"


def planned_recipe(plan: Plan, **rest: Any) -> tuple[Recipe, Plan]:
    """The recipe of a plan that was read from a file, and the plan with its options complete."""
    size = None if plan.ratio is None else Size(ratio=plan.ratio)
    recipe = Recipe.of(plan.method, plan.options, size=size, **rest)
    return recipe, replace(plan, options=recipe.options)
