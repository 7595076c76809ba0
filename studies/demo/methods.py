"""Every method of `decode.py` on the demo, with a model of every kind that the methods need, trained once.

    pip install -e '.[studies]'
    python -m studies.demo.methods                # 2 CPU cores: about 40 minutes, of which PPO and RLOO take 15
    python -m studies.demo.methods --scale 0.02 --train steps=2 --out runs/try --results runs/try   # does it all run?

A second run goes on where the first stopped. Weights are picked on prompts of the eval split by the true reward. One
training run says little about a method (docs/study_demo.md): this table shows that all of them run, and what they cost.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from pargs_jax.demo.task import DEMO_LM
from pargs_jax.durable_files import write_whole
from studies.demo_models import EVERY_METHOD, Entry, make_data, measure, models_of, picked
from studies.experiment import Setting, estimate, open_study, study_parser, summary, train_models
from studies.page import fill_page, table

RESULTS = Path("studies/demo/results_of_methods")
PAGE = Path("docs/study_methods.md")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = study_parser(__doc__, "demo", str(DEMO_LM))
    parser.set_defaults(results=RESULTS, seeds=1, scale=0.5, batch_size=50)
    given = parser.parse_args(arguments)
    study = open_study(given, "demo")
    make_data(study, study.lm)
    for seed in range(study.seeds):
        train_models(study, models_of(study, seed, study.lm), [seed])
    found = measure(study, EVERY_METHOD, range(study.seeds), study.lm, "answers")
    report(found, given.results)


def report(found: dict[str, Setting], folder: Path) -> None:
    """Writes the numbers and the table, and fills the documentation's page where these are the study's own."""
    chosen = picked(found, EVERY_METHOD)
    methods = table(
        ("method", "models", "weight", "true reward", "KL, nats", "LM tokens", "RM tokens", "ms an answer"),
        [_row(entry, found[chosen[entry.name]]) for entry in EVERY_METHOD],
        texts=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "results.json", json.dumps({"picked": chosen, "settings": summary(found)}, indent=1))
    write_whole(folder / "tables.md", methods)
    if folder == RESULTS:
        fill_page(PAGE, {"methods": methods})
    print(methods)


def _row(entry: Entry, setting: Setting) -> tuple[str, ...]:
    def of(metric: str, form: str) -> str:
        return form.format(*estimate(setting[f"test {metric}"]))

    weight = "-" if setting["weight"] is None else f"{setting['weight']:g}"
    models = ", ".join(entry.models) or (f"decodes itself: {entry.lm}" if entry.lm else "-")
    seconds = 1000 * estimate(setting["test seconds"]).mean
    return (
        entry.method, models, weight, of("reward", "{:.2f} ± {:.2f}"), "-" if entry.lm else of("kl", "{:.1f}"),
        of("lm_tokens", "{:.0f}"), of("rm_tokens", "{:.0f}"), f"{seconds:.0f}",
    )  # fmt: skip


if __name__ == "__main__":
    main()
