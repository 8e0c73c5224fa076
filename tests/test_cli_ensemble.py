"""vitxr factorize of several models: interrupted, it saves what there is and says how to go on."""

import signal

import numpy as np
import pytest
from synthetic import extraction, stimuli
from test_resume import count_fits

import vitxr
from vitxr.cli import main
from vitxr.factor import methods

RUN = ["--layer", "0", "--rank", "2,3", "--replicates", "2", "--feature-maps", "4", "--quiet"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    ds = extraction(stimuli(per_class=2), step=8, layers=(0,), channels=6)
    vitxr.save(ds, tmp_path / "run.nc")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def signal_after(patch, number, ended):
    """Send a signal to this process when so many fits have ended."""
    real, seen = methods.hals.fit_models, []

    def fit_models(*args, **given):
        def stop(model, iteration, objective, last):
            seen.extend([model] * last)
            if len(seen) >= ended:
                signal.raise_signal(number)

        return real(*args, **{**given, "callback": stop})

    patch.setattr(methods.hals, "fit_models", fit_models)


@pytest.mark.parametrize(
    ("number", "status", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_interrupted_and_resumed(folder, number, status, word, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        signal_after(patch, number, 2)
        with pytest.warns(RuntimeWarning, match="2 of 4 fits have no model"):
            assert main(["factorize", "run.nc", "half.nc", *RUN]) == status
    told = capsys.readouterr()
    assert "Written to half.nc" in told.out
    assert f"vitxr factorize: {word}: 2 of 4 fits are left. The same command with" in told.err
    assert "--resume half.nc goes on" in told.err
    fitted = count_fits(monkeypatch)
    assert main(["factorize", "run.nc", "all.nc", *RUN, "--resume", "half.nc"]) == 0
    assert len(fitted) == 2
    assert main(["factorize", "run.nc", "at-once.nc", *RUN]) == 0
    one, other = vitxr.open("all.nc"), vitxr.open("at-once.nc")
    np.testing.assert_allclose(one.objective, other.objective, rtol=1e-5)
    assert not one.failed.any()


def test_floors_and_what_is_refused(folder, capsys):
    assert main(["factorize", "run.nc", "e.nc", *RUN, "--floors"]) == 0
    assert np.isfinite(vitxr.open("e.nc").shuffled_objective).all()
    capsys.readouterr()
    single = ["factorize", "run.nc", "f.nc", "--layer", "0", "--rank", "2"]
    for option in (["--floors"], ["--resume", "e.nc"]):
        assert main([*single, *option]) == 1
        assert f"{option[0]} is for ensembles: give several ranks" in capsys.readouterr().err
    assert main(["factorize", "run.nc", "g.nc", *RUN, "--resume", "e.nc", "--seed", "1"]) == 1
    assert "random_state 0, not 1" in capsys.readouterr().err
    assert main(["factorize", "run.nc", "g.nc", *RUN, "--resume", "none.nc"]) == 1
    assert "none.nc" in capsys.readouterr().err
    assert not (folder / "g.nc").exists()
