"""Heal a compressed model: it learns to give what the dense model gives, by distillation of whole outputs.

Minimises KL(dense ‖ compressed) of the next-token distributions; beside it the relative squared errors of the layers'
outputs, which say more a token than the divergence alone, and a little of the text's own next tokens, of which the
dense model is but an estimate. Trained are the routed experts' factors, the routers and the norms before them and, at
smaller rates, everything else. A text that comes again comes changed: cut into windows elsewhere, with tokens in it
that the dense model might have written instead.

Some windows of the text are held out. The state that is best on them is what is written, the unhealed one among the
candidates. Training that makes them much worse than unhealed goes back and on at a third of the rate; in the second
half it stops when they have not become better for a while. A killed run goes on from its last look.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from .checkpoint import Checkpoint, CheckpointWriter, ModelReader, refuse_existing, resolve
from .errors import NotFinite, UserError, unknown
from .fields import routers
from .files import digest_of, file_digest, locked, read_json, replacing
from .fitting.descent import Kept, descend
from .fitting.soap import Soap, falling
from .identity import maths_version, structure_digest
from .loading import Model, load
from .progress import Progress, Steps, silent
from .runtime.module import FactorisedExperts
from .streaming import checked_device, compute_dtype
from .text import (
    Reading,
    all_windows,
    kept_windows,
    load_tokenizer,
    model_length,
    own_weight,
    vocabulary_of,
    write_windows,
)

STAGE = "heal"
OWN_TEXT = "heal-text.safetensors"
Trained = Literal["experts", "all"]
# Of each tensor's root mean square and of the square root of the divergence at the start, nats: as far as the model is
# from the dense one, so far its factors have to go.
RATE = 0.05
MANY = 1000  # steps: with more, the rate is lower by their square root; unchanged, 5,000 stood still for most of them
REST = 0.4  # of that for what is not part of the experts' layers: attention, embeddings, shared experts
MIXTURES = 1 / 3  # of that where experts mix bases: a weight moves with its factor, with the mixing and with every base
BATCH = 2048  # tokens a step
LAYERS = 3.0  # weight of the layers' relative squared errors beside the divergence
# Weight of the text's own next tokens in the first pass over it; in the n-th a part in n, or they too are learnt by
# heart. More learns the text rather than the model.
LABELS = 0.1
# Of the tokens, from the second pass over the text on: drawn anew from the dense model, given what stands before them.
# The same tokens again and again are learnt by heart: their divergence fell to half of the held-out windows'.
REDRAWN = 0.3
LOGITS = 1 << 26  # entries of the logits in memory at once
HELD_OUT = 32  # windows, at most a tenth of the text
LOOK = 50  # steps between looks at them
OVERSHOT = 1.5  # times the divergence at the start: the rate was too high
# Of the steps without a better state before it stops, in the second half: before, at high rates, it may be farther from
# the dense model than it began, and end much nearer.
PATIENCE = 0.25
WARMUP = 40
OWN_WINDOWS = 1024  # that the dense model writes at most, where the text is its own


@dataclass(frozen=True)
class Healing:
    """What a healing did.  validation: (step, mean KL on the held-out windows, nats a token) at every look."""

    steps: int
    best_step: int
    tokens: int
    validation: list[tuple[int, float]] = field(default_factory=list)


def heal(
    student: str | Path, teacher: str, output: str | Path, *, steps: int, text: str | None = None,
    seqlen: int | None = None, rate: float = RATE, labels: float = LABELS, train: Trained = "all", seed: int = 0,
    device: torch.device | str | None = None, run: str | Path | None = None, text_column: str | None = None,
    trust_remote_code: bool = False, progress: Progress = silent,
) -> Healing:  # fmt: skip
    """Distils the dense model into a compressed folder and writes the healed one.

    Args:
        student, teacher: folder of the compressed model, and the model it was made from.
        output: folder to write; it must not exist.
        steps: of BATCH tokens each; fewer are taken when the held-out text says so.
        text: as `--calibration`; all of it is used, over and over if need be; of sources with weights, as much as
            there is in these proportions.
        rate: of the factors, see RATE.
        labels: weight of the text's own next tokens beside the dense model's; 0: distillation alone.
        train: `experts`: factors, routers and the norms before them; `all`: everything else too.
        run: folder for the state of an unfinished healing; `OUTPUT.heal` by default, removed at the end.
        text_column: of .jsonl, .parquet and datasets that holds the text or the messages, see text.read_documents.
        trust_remote_code: whether code from the models' repositories may run, for what transformers lacks.

    Raises UserError for anything that the caller can mend.
    """
    output, folder, device = Path(output).expanduser(), resolve(str(student)), checked_device(device)
    refuse_existing(output)
    if steps < 1:
        raise UserError(f"--heal needs at least one step, found {steps}.")
    if not labels >= 0:
        raise UserError(f"--labels must not be negative, found {labels}.")
    if not rate > 0:
        raise UserError(f"The rate must be above 0, found {rate}.")
    if train not in get_args(Trained):
        raise unknown("choice of what to train", train, get_args(Trained))
    place = _run_of(output, run)
    with locked(place.with_name(f".{place.name}.heal.lock"), str(place)):
        return _heal(
            student, teacher, output, folder, place, steps=steps, text=text, seqlen=seqlen, rate=rate, labels=labels,
            train=train, seed=seed, device=device, text_column=text_column, trust_remote_code=trust_remote_code,
            progress=progress,
        )  # fmt: skip


def _heal(
    student: str | Path, teacher: str, output: Path, folder: Path, place: Path, *, steps: int, text: str | None,
    seqlen: int | None, rate: float, labels: float, train: Trained, seed: int, device: torch.device,
    text_column: str | None, trust_remote_code: bool, progress: Progress,
) -> Healing:  # fmt: skip
    model = load(str(student), device=device, dtype=torch.float32, trust_remote_code=trust_remote_code)
    blocks = [m for m in model.modules() if isinstance(m, FactorisedExperts)]
    if not blocks:
        raise UserError(
            f"{student}: holds ordinary experts (fewer, or narrower ones). Healing trains factors; compress with a "
            "method that leaves some."
        )
    dense = load(teacher, device=device, dtype="auto", trust_remote_code=trust_remote_code)
    # Of `to` transformers' wrapper hides the annotations.
    dense = dense.to(compute_dtype(dense.dtype, device)).requires_grad_(False)  # type: ignore[arg-type]
    if dense.config.get_text_config().vocab_size != model.config.get_text_config().vocab_size:
        raise UserError(f"{teacher}: has another vocabulary than {student}; give the model it was made from.")
    length = model_length(model.config, seqlen)
    # Of text of its own, at most half of what will be read, and never too little to hold some out.
    share = min(0.5, own_weight(text))
    own = min(OWN_WINDOWS, max(HELD_OUT, int(steps * max(1, BATCH // length) * share))) if share else 0
    reading = Reading(load_tokenizer(folder, trust_remote_code), vocabulary_of(model), length, text_column)
    _check_teacher(folder, teacher)
    dense_digest = _weights_digest(resolve(teacher))
    every = _windows(dense, dense_digest, reading, text, own, seed, place / OWN_TEXT, progress)
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))
    aside = min(HELD_OUT, len(every) // 10)
    if aside < 1:
        raise UserError(f"{text}: {len(every)} windows of {length} tokens are too few to heal on; 10 at least.")
    held, seen = every[order[:aside].sort().values], every[order[aside:].sort().values]
    if any(form.mixes_bases for block in blocks for form in block.forms.values()):
        rate *= MIXTURES
    rate *= min(1.0, math.sqrt(MANY / steps))
    rates = dict.fromkeys(trainable(model, held[:1].to(device)), rate)
    if train == "all":
        rates = {n: rates.get(n, REST * rate) for n, p in model.named_parameters() if p.is_floating_point()}
    job = _Healing(model, dense, rates, seen, steps, labels, seed, place)
    given = hashlib.sha256(every.numpy().tobytes()).hexdigest()
    weights = _weights_digest(folder), dense_digest, maths_version("healing", "fitting")
    about = [*weights, steps, rate, labels, train, seed, length, given]
    healing = job.go(held, hashlib.sha256(repr(about).encode()).hexdigest(), progress)
    _write(folder, model, job.kept.best, output, healing)
    job.forget()
    return healing


def trainable(model: Model, ids: Tensor) -> list[str]:
    """Names of the parameters that healing trains: factors, routers, and the norms whose output the routers read."""
    found: dict[int, None] = {}
    norms: dict[int, tuple[Tensor, nn.Module]] = {}
    handles = []

    def after_norm(module: nn.Module, args: tuple, out: Tensor) -> None:
        norms[out.data_ptr()] = (out, module)  # the tensor is kept, or its address would be another's

    def before_block(module: nn.Module, args: tuple, kwargs: dict) -> None:
        entering = next(a for a in [*args, *kwargs.values()] if isinstance(a, Tensor))
        if entering.data_ptr() in norms:
            found.update({id(p): None for p in norms[entering.data_ptr()][1].parameters()})

    every = [(name, module) for name, module in model.named_modules() if isinstance(module, FactorisedExperts)]
    for path, experts in every:
        layer = experts.layer
        parent = model.get_submodule(path.rpartition(".")[0])
        decoder = model.get_submodule(path.removesuffix(layer.name.removeprefix(layer.decoder_layer)))
        handles.append(parent.register_forward_pre_hook(before_block, with_kwargs=True))
        norms_here = [m for m in decoder.modules() if "norm" in type(m).__name__.lower()]
        handles += [m.register_forward_hook(after_norm) for m in norms_here]
        found.update({id(p): None for p in experts.parameters(recurse=False) if p.is_floating_point()})
    named = dict(model.named_parameters())
    found.update({id(named[name]): None for name in routers(model)})
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [name for name, parameter in model.named_parameters() if id(parameter) in found]


class _Healing:
    """The training loop and its state on disk."""

    def __init__(
        self, model: Model, dense: Model, rates: dict[str, float], seen: Tensor, steps: int, labels: float,
        seed: int, run: Path,
    ):  # fmt: skip
        self.model, self.dense, self.seen, self.steps, self.seed = model, dense, seen, steps, seed
        self.rates, self.labels = rates, labels
        self.file = run / "heal.pt"
        model.requires_grad_(False)
        self.parameters = {n: p.requires_grad_() for n, p in model.named_parameters() if n in rates and p.numel()}
        self.kept = Kept(lambda: self.parameters)
        self.step = 0
        self.batch = max(1, BATCH // seen.shape[1])

    def go(self, held: Tensor, key: str, progress: Progress) -> Healing:
        steps = Steps(progress, STAGE, self.steps)
        left = self._left(key)
        self.validation = [tuple(e) for e in left["validation"]] if left else [(0, self._held_out(held))]
        if not math.isfinite(self.validation[0][1]):
            raise NotFinite("the divergence of the compressed model from the dense one, before healing")
        self.kept.offer(self.validation[0][1], 0)  # the unhealed state is a candidate
        far = math.sqrt(self.validation[0][1])
        self.optimiser = Soap((p, far * self.rates[n]) for n, p in self.parameters.items())
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimiser, lambda step: falling(step, self.steps, WARMUP)
        )
        if left:
            self._resume(left)
        steps.skip(self.step)

        def learn() -> float:
            loss = self._learn()
            self.step += 1
            first, last = self.validation[0][1], self.validation[-1][1]
            steps.detail = f"held out {last:.4f} nats from the dense model, {first:.4f} at first"
            steps.tick()
            return loss

        descend(
            self.optimiser, self.schedule, learn, self.kept, steps=self.steps, start=self.step,
            look=lambda: self._held_out(held), every=LOOK, looked=lambda step, now: self._looked(step, now, key),
            stop=self._stuck,
        )  # fmt: skip
        return Healing(self.step, self.kept.step, self.step * self.batch * self.seen.shape[1], self.validation)

    def _learn(self) -> float:
        """Leaves the gradients of this step's windows on the parameters; returns the objective."""
        text, ids = self._windows()
        labels, total = self.labels / (1 + self._place[0]), 0.0
        for own, part in zip(self._parts(text), self._parts(ids), strict=True):
            loss = self._objective(own, part, labels).sum() / ids.numel()
            loss.backward()
            total += loss.item()
        return total

    @property
    def _place(self) -> tuple[int, int]:
        """Passes over the text that are behind this step, and steps of its own pass."""
        return divmod(self.step, max(1, len(self.seen) // self.batch))

    def _windows(self) -> tuple[Tensor, Tensor]:
        """(n, L) of the text for this step, the same after a restart, and what is read in its place. Each pass has its
        own order and offset."""
        number, place = self._place
        generator = torch.Generator().manual_seed(self.seed + 1 + number)
        order = torch.randperm(len(self.seen), generator=generator)
        ids = self.seen
        if number:
            ids = ids.flatten().roll(int(torch.randint(ids.shape[1], (1,), generator=generator))).view_as(ids)
        ids = ids[order[place * self.batch : (place + 1) * self.batch]]
        return ids, (self._redrawn(ids) if number else ids)

    @torch.no_grad()
    def _redrawn(self, ids: Tensor) -> Tensor:
        """ids (n, L) with REDRAWN of them sampled from the dense model's distributions, given the tokens of `ids`."""
        generator = torch.Generator().manual_seed((self.seed << 32) + self.step)
        drawn = ids.clone()
        for part, given in zip(self._parts(drawn), self._parts(ids), strict=True):
            chosen = torch.rand(part[:, 1:].shape, generator=generator) < REDRAWN
            probabilities = self._outputs(self.dense, given)[0][:, :-1][chosen.to(self.model.device)].exp().cpu()
            if len(probabilities):
                part[:, 1:][chosen] = torch.multinomial(probabilities, 1, generator=generator).flatten()
        return drawn

    def _parts(self, ids: Tensor) -> tuple[Tensor, ...]:
        vocabulary = self.model.config.get_text_config().vocab_size
        return ids.split(max(1, LOGITS // (ids.shape[1] * vocabulary)))

    def _divergence(self, ids: Tensor) -> Tensor:
        """ids (n, L) -> (n, L) KL(dense ‖ compressed) of the next token's distribution."""
        with torch.no_grad():
            wanted = self._outputs(self.dense, ids)[0]
        return _kl(wanted, self._outputs(self.model, ids)[0])

    def _objective(self, text: Tensor, ids: Tensor, labels: float) -> Tensor:
        """(n, L) of windows `ids`: the divergence; of every layer the squared error of its output relative to the mean
        square; and the surprise at the next token, where that is the text's own."""
        with torch.no_grad():
            wanted, states = self._outputs(self.dense, ids, hidden=True)
        given, own = self._outputs(self.model, ids, hidden=True)
        errors = [
            (a - b).square().sum(-1) / b.square().sum(-1).mean().clamp(min=1e-30)
            for a, b in zip(own, states, strict=True)
        ]
        following = ids[:, 1:].to(given.device)
        surprise = -given[:, :-1].gather(-1, following.unsqueeze(-1)).squeeze(-1) * (ids == text)[:, 1:].to(given)
        loss = _kl(wanted, given) + LAYERS * sum(errors) / max(1, len(errors))
        return loss + labels * nn.functional.pad(surprise, (0, 1))

    @staticmethod
    def _outputs(model: Model, ids: Tensor, hidden: bool = False) -> tuple[Tensor, list[Tensor]]:
        """(n, L, V) log-probabilities and the (n, L, H) outputs of the layers, where the model tells them."""
        out = model(input_ids=ids.to(model.device), use_cache=False, output_hidden_states=hidden)
        states = (out.hidden_states or ()) if hidden else ()
        return out.logits.float().log_softmax(-1), [state.float() for state in states[1:]]

    @torch.no_grad()
    def _held_out(self, held: Tensor) -> float:
        return torch.cat([self._divergence(part).cpu() for part in self._parts(held)]).mean().item()

    def _looked(self, step: int, now: float, key: str) -> None:
        if self.kept.step != step and not now <= OVERSHOT * self.validation[0][1]:
            self._slow_down()
        self.validation.append((step, now))
        state = {
            "key": key, "step": step, "best_step": self.kept.step, "validation": self.validation,
            "best": self.kept.state, "parameters": {n: p.detach() for n, p in self.parameters.items()},
            "optimiser": self.optimiser.state_dict(), "schedule": self.schedule.state_dict(),
        }  # fmt: skip
        with replacing(self.file) as partial:
            torch.save(state, partial)

    @torch.no_grad()
    def _slow_down(self) -> None:
        """Much worse than unhealed: back to the best state, at a third of the rate."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.kept.best[name])
        self.optimiser.state.clear()
        self.schedule.base_lrs = [rate / 3 for rate in self.schedule.base_lrs]
        for group in self.optimiser.param_groups:
            group["lr"] /= 3

    def _stuck(self, step: int) -> bool:
        patience = max(PATIENCE * self.steps, 4 * LOOK)  # a short healing would else end unseen
        return step - max(self.kept.step, self.steps // 2) >= patience

    def _left(self, key: str) -> dict | None:
        """The state on disk when the same healing left it; any other is left behind."""
        if not self.file.is_file():
            return None
        try:
            state = torch.load(self.file, map_location=self.model.device, weights_only=True)
            left = state["key"]
        except Exception as error:  # torch raises a different type for every kind of damage
            raise UserError(f"{self.file}: can't be read ({error}). Remove it to heal from the beginning.") from None
        return state if left == key else None

    @torch.no_grad()
    def _resume(self, state: dict) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(state["parameters"][name])
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load_state_dict(state["schedule"])
        self.step = state["step"]
        self.kept.state, self.kept.step = state["best"], state["best_step"]
        self.kept.value = min(value for _, value in self.validation)

    def forget(self) -> None:
        for name in (self.file.name, OWN_TEXT):
            (self.file.parent / name).unlink(missing_ok=True)
        if self.file.parent.is_dir() and not any(self.file.parent.iterdir()):
            self.file.parent.rmdir()


def _check_teacher(folder: Path, teacher: str) -> None:
    """Warns where the student's records say that it was made from another model."""
    made_from = ((read_json(folder / "compression.json") or {}).get("about") or {}).get("weights")
    if made_from is not None and made_from != structure_digest(Checkpoint(resolve(teacher))):
        warnings.warn(
            f"{teacher} is not the model that {folder} was made from, by its config.json and the headers of its files; "
            "healing goes towards what it is given.",
            stacklevel=3,
        )


def _weights_digest(folder: Path) -> str:
    """Of all bytes of a folder's shards, which are read whole here in any case."""
    return digest_of([file_digest(path) for path in sorted(set(Checkpoint(folder).files.values()))])


def _windows(
    dense: Model, dense_digest: str, reading: Reading, text: str | None, count: int, seed: int, kept: Path,
    progress: Progress,
) -> Tensor:  # fmt: skip
    """All of a text, and `count` windows of the dense model's own."""
    parts, length = [], reading.length
    if own_weight(text) < 1:
        parts.append(all_windows(reading, text))
    if count:
        about = (dense_digest, maths_version("text"), count, length, seed)
        parts.append(
            kept_windows(
                kept,
                about,
                (count, length),
                lambda: write_windows(dense, reading.tokenizer, count, length, seed, progress),
            )
        )
    return torch.cat(parts)


def _kl(wanted: Tensor, given: Tensor) -> Tensor:
    return nn.functional.kl_div(given, wanted, reduction="none", log_target=True).sum(-1)


def _run_of(output: Path, run: str | Path | None) -> Path:
    return Path(run).expanduser() if run else output.with_name(output.name + ".heal")


def _write(folder: Path, model: Model, best: dict[str, Tensor], output: Path, healing: Healing) -> None:
    """The compressed folder again, with what was trained in place of what was there."""
    checkpoint = Checkpoint(folder)
    reader = ModelReader(checkpoint, model)
    # A tied tensor has two names, and the checkpoint may have it under either or both.
    name_of = {id(p): name for name, p in model.named_parameters()}
    every = {name: name_of[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    best = {name: best[first] for name, first in every.items() if first in best}
    targets, on_disk = reader.targets, reader.disk_layout(best)

    def change(name: str, tensor: Tensor) -> dict[str, Tensor]:
        healed = on_disk.get(name, best.get(targets.get(name, (name,))[0]))
        # Tied ones must not share.
        return {name: tensor if healed is None else healed.to(tensor, copy=True).view_as(tensor)}

    with CheckpointWriter(output) as writer:
        writer.copy_plain(checkpoint, list(checkpoint.files), change=change, checked=reader.parameters)
        writer.companions(folder)
        writer.text("config.json", (folder / "config.json").read_text())
        for card in folder.glob("README.md"):
            writer.text(card.name, card.read_text())
        writer.text("heal.json", json.dumps(healing.__dict__, indent=1) + "\n")
