"""What healing gives back: perplexity of compressed models before and after distillation.

    python benchmarks/healing.py                                   fast form, 40 and 60 %, 2 M tokens, both texts
    python benchmarks/healing.py --ratios 0.6 --tokens 10000000 --calibrations like
    python benchmarks/healing.py --form linear samples=1024 refine_steps=600       from a better start
    python benchmarks/healing.py --every-text              healed on all texts that are not measured on, 1.9 M tokens
    python benchmarks/healing.py --own-text 0.5            as `compress --heal` does: half of the text the model's own
    python benchmarks/healing.py --model results/second-moe --output results/second-healing.json

Columns as in quality.py. Prints a table as it goes and writes JSON (default results/healing.json); rows already there
are not run again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import moefactor
from moefactor.healing import BATCH, LABELS
from moefactor.text import with_own
from quality import CALIBRATIONS, MODEL, ROOT, TEXTS, line, measure

EVERY = (CALIBRATIONS["like"], CALIBRATIONS["wikitext2"], "ptb/valid.txt", CALIBRATIONS["unlike"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--ratios", default="0.4,0.6")
    parser.add_argument("--calibrations", default="like,unlike")
    parser.add_argument("--form", default="fast", choices=("fast", "linear", "tight"))
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--own-text", type=float, default=0.0, help="share of the text that the model writes itself")
    parser.add_argument(
        "--every-text", action="store_true", help=f"heal on {', '.join(EVERY)}; calibrated on the one text all the same"
    )
    parser.add_argument("--labels", type=float, default=LABELS, help="weight of the text's own next tokens")
    parser.add_argument("options", nargs="*", help="of compress, as name=number", metavar="OPTION=NUMBER")
    parser.add_argument("--output", type=Path, default=Path("results/healing.json"))
    arguments = parser.parse_args()
    options = {name: json.loads(value) for name, _, value in (option.partition("=") for option in arguments.options)}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    if "dense" not in results:
        results["dense"] = measure(arguments.model, arguments.data)
    print(
        f"{'':38}{'ratio':>6}{'text':>10}{'kept':>9}" + "".join(f"{t:>10}" for t in TEXTS) + f"{'× dense':>9}{'s':>9}"
    )
    for ratio in map(float, arguments.ratios.split(",")):
        for text in arguments.calibrations.split(","):
            key = "/".join(map(str, (arguments.form, ratio, text, arguments.tokens, *arguments.options)))
            key += f"/{arguments.own_text}" if arguments.own_text else ""
            key += "/every text" if arguments.every_text else ""
            key += f"/labels {arguments.labels:g}" if arguments.labels != LABELS else ""
            if key not in results:
                results[key] = run(arguments, ratio, text, options)
                arguments.output.write_text(json.dumps(results, indent=1))
            for state, row in results[key].items():
                label = f"{arguments.form}, {state}, {arguments.tokens / 1e6:g} M tokens"
                print(line(label, ratio, text, row, results["dense"]), flush=True)


def run(arguments: argparse.Namespace, ratio: float, text: str, options: dict) -> dict:
    model, data = str(arguments.model), arguments.data
    source = str(data / CALIBRATIONS[text])
    with tempfile.TemporaryDirectory() as folder:
        plain, healed = Path(folder) / "plain", Path(folder) / "healed"
        started = time.perf_counter()
        moefactor.compress(
            model, "biaxial", ratio, plain, calibration=source, seqlen=256, form=arguments.form,
            own_text=arguments.own_text, **options,
        )  # fmt: skip
        middle = time.perf_counter()
        if arguments.every_text:
            source = f"{folder}/every.txt"
            Path(source).write_text("\n\n".join((data / file).read_text() for file in EVERY))
        report = moefactor.heal(
            plain, model, healed, steps=-(-arguments.tokens // BATCH), seqlen=256, labels=arguments.labels,
            text=with_own(source) if arguments.own_text else source,
        )  # fmt: skip
        end = time.perf_counter()
        return {
            "unhealed": {"seconds": middle - started, **measure(plain, data)},
            "healed": {"seconds": end - middle, "validation": report.validation, **measure(healed, data)},
        }


if __name__ == "__main__":
    main()
