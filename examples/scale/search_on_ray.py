"""Search hyper-parameters with Ray Tune, resumable: a trial per setting, compared by the validation loss.

Needs `pip install 'cellstack[torch]' 'ray[tune]'`.
"""

from functools import partial
from typing import Any

from ray import tune

from cellstack import train


def trial(settings: dict[str, Any], x: Any, y: Any) -> None:
    """Train with one setting, and report the validation loss of the epoch that is kept."""
    result = train.fit(x, y, threads=1, progress=False, **settings)
    assert result.fit.best is not None
    tune.report({"loss": result.fit.best["validation_loss"]})


def search(x: Any, y: Any, space: dict[str, Any], folder: str, samples: int = 1) -> Any:
    """Return Ray Tune's results; a folder with an earlier search, which was stopped, is continued.

    Args:
        x, y: data of `train.fit`.
        space: options of `train.fit`, some of them with `tune.choice` and the like.
        folder: where Tune stores the search: an absolute path that all machines share.
        samples: the number of random samples of the space.
    """
    one = tune.with_parameters(partial(trial), x=x, y=y)
    if tune.Tuner.can_restore(folder):
        return tune.Tuner.restore(folder, trainable=one, restart_errored=True, resume_unfinished=True).fit()
    storage, _, name = folder.rpartition("/")
    config = tune.TuneConfig(metric="loss", mode="min", num_samples=samples)
    run = tune.RunConfig(name=name, storage_path=storage, verbose=0)
    return tune.Tuner(one, param_space=space, tune_config=config, run_config=run).fit()
