"""Two processes of torchrun do what one does: samples, labels, searches to the last digit, training to
rounding."""
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import ONE_CORE, ROOT, SMALL, SMOKE, even, tiny
from safetensors.torch import load_file

import rl
from minipav import checkpoint, parallel
from minipav.advantage import monte_carlo, seed_rollouts
from minipav.files import write_tensors
from minipav.reinforce import Reinforce
from minipav.run import Run
from minipav.search.beam import beam
from minipav.search.dvts import dvts
from minipav.search.measure import Bench, Cell
from minipav.sft import _train
from minipav.utils import Fail, apply_step, main_guard, make_optimizers, pick_device
from minipav.verifier import score


def torchrun(*args):
    """Two processes of python with these arguments."""
    args = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "--", *map(str, args)]
    return subprocess.run([sys.executable, "-m", *args], cwd=ROOT, capture_output=True, text=True,
                          timeout=300, env=ONE_CORE | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})


def answers(folder):
    """All that is divided among processes, on a run's models."""
    run = Run.open(folder, "cpu")
    run.task.outcome = lambda problem, text: even(run.task, problem, text)      # some are right
    bench, problems = Bench(run), run.problems("test", 7)
    seeds = seed_rollouts(run.model("base"), run, problems, 3, 1)
    labels = monte_carlo(run.model("weak"), run, problems, seeds, seeds.ends >= 0, 2, 5)
    s = bench.search(Cell("beam", "effective", prover="weak", alpha=0.5))
    r = beam(s, problems, [2], 3)[0]
    text = torch.tensor(list("|".join(r.text).encode()) or [0])
    by_state = beam(bench.search(Cell("beam", "q_pi", quota="state")), problems, [3], 4)[0]
    trial = rl.Trial(lr=1e-3, iterations=1, batch=8, group=2, problems=2, baseline="mean")
    with tempfile.TemporaryDirectory() as out:
        facts = Reinforce(run, run.model("base"), Path(out), "pav", trial).iterate(0)
    trees = dvts(bench.search(Cell("dvts", "q_pi")), problems, [2], 3)[0]
    return {"seeds": seeds.tokens, "by_state": by_state.right, "values": by_state.q, "trees": trees.q,
            "q": labels.q, "cost": labels.cost, "right": r.right, "text": text,
            "solved": r.solved, "tokens": r.tokens, "read": r.verifier_tokens,
            "facts": torch.tensor(list(facts.values())),
            "scores": score(run.model("q_pi"), seeds.tokens, seeds.ends).nan_to_num(-1)}


def test_samples_labels_scores_and_searches_are_the_same(smoke_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(smoke_run[0], folder)
    done = torchrun(__file__, folder, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    two, one = load_file(tmp_path / "two"), answers(folder)
    assert one["text"].numel() > 7 and one["solved"].any() and one["q"].any()
    for name, x in one.items():
        close = name in ("scores", "values", "trees", "facts")
        same = torch.allclose(two[name], x, atol=1e-5) if close else torch.equal(two[name], x)
        assert same, name


def weights(keep, stop=0):
    """Of a model after four steps of SFT, or one that ends unsaved at step `stop`, as one vector."""
    def log(step, *_):
        if step == stop:
            raise KeyboardInterrupt
    model, data = tiny(), torch.Generator().manual_seed(1)
    batches = [(torch.randint(29, (6, 9), generator=data), torch.full((6,), 9), torch.full((6,), 3))] * 4
    with suppress(KeyboardInterrupt):
        _train(model, batches, 4, 0.0, 1e-2, log, keeper=keep)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def held():
    """How many numbers of AdamW's first moment each of two processes holds."""
    model, counts = tiny(), torch.zeros(2)
    optimizer, = make_optimizers(model, 0.0, 1e-2)
    sum(p.sum() for p in model.parameters()).backward()
    apply_step(model, [optimizer], 1.0)
    counts[parallel.rank()] = sum(s["exp_avg"].numel() for s in optimizer.optim.state.values())
    parallel.add_up(counts)
    return counts


def test_states_are_divided_and_a_saved_training_goes_on_in_any_number_of_processes(tmp_path):
    done = torchrun(__file__, "states", tmp_path / "saved", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    two, one = load_file(tmp_path / "two"), weights(checkpoint.Keeper())
    assert torch.equal(two["again"], two["whole"]) and torch.allclose(two["whole"], one, atol=1e-5)
    assert two["held"].sum() == len(one) and two["held"].max() < 0.6 * len(one)
    assert torch.allclose(weights(checkpoint.Keeper(tmp_path / "saved", [])), one, atol=1e-5)


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
    def main():
        pick_device("cpu")
        if sys.argv[1] == "fail" and parallel.rank() == 1:
            raise Fail("a mistake")
        parallel.barrier()
        if sys.argv[1] == "states":
            checkpoint.EVERY, saved = 0, Path(sys.argv[2])
            weights(checkpoint.Keeper(saved, []), stop=3)           # after the second step it was saved
            if not parallel.rank():
                shutil.copy(saved, saved.with_name("again"))
            parallel.barrier()
            again = weights(checkpoint.Keeper(saved.with_name("again"), []))
            return write_tensors(sys.argv[3], {"whole": weights(checkpoint.Keeper()), "held": held(),
                                               "again": again})
        write_tensors(sys.argv[2], answers(sys.argv[1]))
    main_guard(main)
