"""Two processes of torchrun do what one does: samples, labels, searches to the last digit, training to
rounding."""
import shutil
import subprocess
import sys
import time

import pytest
import torch
from conftest import ONE_CORE, ROOT, SMALL, SMOKE
from safetensors.torch import load_file

from minipav.advantage import monte_carlo, seed_rollouts
from minipav.files import write_tensors
from minipav.run import Run
from minipav.search.beam import beam
from minipav.search.dvts import dvts
from minipav.search.measure import Bench, Cell
from minipav.utils import pick_device
from minipav.verifier import score


def torchrun(*args):
    """Two processes of python with these arguments."""
    args = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "--", *map(str, args)]
    return subprocess.run([sys.executable, "-m", *args], cwd=ROOT, capture_output=True, text=True,
                          timeout=300, env=ONE_CORE | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})


def answers(folder):
    """All that is divided among processes, on a run's models."""
    run = Run.open(folder, "cpu")
    bench, problems = Bench(run), run.problems("test", 7)
    seeds = seed_rollouts(run.model("base"), run, problems, 3, 1)
    labels = monte_carlo(run.model("weak"), run, problems, seeds, seeds.ends >= 0, 2, 5)
    s = bench.search(Cell("beam", "effective", prover="weak", alpha=0.5))
    r = beam(s, problems, [2], 3)[0]
    text = torch.tensor(list("|".join(r.text).encode()) or [0])
    by_state = beam(bench.search(Cell("beam", "q_pi", quota="state")), problems, [3], 4)[0]
    trees = dvts(bench.search(Cell("dvts", "q_pi")), problems, [2], 3)[0]
    return {"seeds": seeds.tokens, "by_state": by_state.right, "values": by_state.q, "trees": trees.q,
            "q": labels.q, "cost": labels.cost, "right": r.right, "text": text,
            "solved": r.solved, "tokens": r.tokens, "read": r.verifier_tokens,
            "scores": score(run.model("q_pi"), seeds.tokens, seeds.ends).nan_to_num(-1)}


def test_samples_labels_scores_and_searches_are_the_same(smoke_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(smoke_run[0], folder)
    done = torchrun(__file__, folder, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    two, one = load_file(tmp_path / "two"), answers(folder)
    assert one["text"].numel() > 7 and one["q"].shape[1] > 3
    for name, x in one.items():
        close = name in ("scores", "values", "trees")
        same = torch.allclose(two[name], x, atol=1e-6) if close else torch.equal(two[name], x)
        assert same, name


# the policies of SMOKE, and little behind them
LITTLE = [*SMOKE, *"--problems 40 --branches 60 --prover_rollouts 0 --pit_traces 0 --test_problems 8".split(),
          *"--max_n 2 --widths 1".split()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("two") / "run"
    done = torchrun("train.py", *LITTLE, "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done


def test_training_is_the_same_to_rounding(smoke_run, trained):
    one, two = (load_file(out / "base" / "model.safetensors") for out in (smoke_run[0], trained[0]))
    assert all(torch.allclose(one[k], two[k], atol=5e-3) for k in one)
    assert trained[1].stdout.count("q_pi\n") == 1, "one of them prints"


def test_a_resumed_run_of_two_equals_the_uninterrupted_one(trained, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(trained[0], out)
    for path in out.glob("stages/orm.json"):
        path.unlink()
    shutil.rmtree(out / "orm")
    done = torchrun("train.py", *LITTLE, "--out", out, "--resume")
    assert done.returncode == 0, done.stderr
    assert (out / "orm/model.safetensors").read_bytes() == (trained[0] / "orm/model.safetensors").read_bytes()


@pytest.mark.slow
def test_rl_and_search_by_two(trained):
    out, search = trained[0], "--search beam:effective --alpha 0.5 --problems 5 --widths 2".split()
    for args in (("rl.py", "--reward", "outcome", "pav", *SMALL, "--no_rft"), ("search.py", *search)):
        done = torchrun(*args, "--run", out)
        assert done.returncode == 0, done.stderr
    assert list(out.glob("rl/pav-*/rows.csv")) and list(out.glob("search/beam-effective-base-*.csv"))


def test_one_that_fails_ends_them_all(tmp_path):
    """With its error, and at once, though the other one waits for it."""
    start = time.time()
    done = torchrun(__file__, "fail")
    assert done.returncode != 0 and "error: a mistake" in done.stderr and time.time() - start < 60


if __name__ == "__main__":
    from minipav import parallel
    from minipav.utils import Fail, main_guard

    def main():
        pick_device("cpu")
        if sys.argv[1] == "fail" and parallel.rank() == 1:
            raise Fail("a mistake")
        parallel.barrier()
        write_tensors(sys.argv[2], answers(sys.argv[1]))
    main_guard(main)
