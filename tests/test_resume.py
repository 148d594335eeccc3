"""Long work that is killed goes on to the same end: trainings, calls of the sampler, beams."""
import copy
import functools
import importlib
import os
import shutil
import signal
import time
from dataclasses import replace

import pytest
import torch
from conftest import SMOKE, even, run_main, tiny

import train
from minipav import checkpoint, verifier
from minipav.checkpoint import Keeper
from minipav.data import Traces
from minipav.run import Run
from minipav.sampler import sample
from minipav.search import METHODS
from minipav.search.measure import Bench, Cell
from minipav.search.score import SCORES
from minipav.sft import _train
from minipav.verifier import ExactValues, score, train_verifier

LESS = ("--weak_at 0.3 --problems 40 --branches 40 --pit_traces 0 --prover_rollouts 40 --test_problems 8 "
        "--max_n 2 --widths 1")


class Killed(BaseException):
    pass


@pytest.fixture(autouse=True)
def saves_at_every_step(monkeypatch):
    monkeypatch.setattr(checkpoint, "EVERY", -1)


def killed_at(k):
    calls = []

    def log(*x):
        calls.append(x)
        if len(calls) == k:
            raise Killed
    return log


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))


def test_sft_and_a_verifiers_training_go_on_where_they_were_killed(tmp_path, monkeypatch):
    torch.manual_seed(0)
    tokens = torch.randint(29, (24, 12))
    lengths, none = torch.full((24,), 12), lambda *x: None

    def sft(model, log, keep):
        parts = tokens.split(4) * 2
        batches = ((t, lengths[:4], lengths[:4] // 2) for t in parts)
        _train(model, batches, 10, 0.01, 1e-3, log, keeper=keep)
        return model

    ends = torch.tensor([[3, 7, 11]]).repeat(24, 1)
    yes, q = torch.ones_like(ends, dtype=torch.bool), torch.rand(24, 3)
    data = Traces(torch.arange(24), tokens, lengths, ends, q, yes.long(), yes, ~yes, q[:, 2].round(), lengths)

    def verifier(model, log, keep):
        return train_verifier(model, data, data[:8], steps=10, batch_size=8, lr_muon=0.01, lr_adamw=1e-3,
                              seed=1, log=log, keeper=keep)[0]
    def told_at(k):
        return lambda step, *x: step == k and [os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)]

    for name, run in (("sft", sft), ("verifier", verifier)):
        rows = [1, 2]
        want = run(tiny(), none, checkpoint.NOT_KEPT)
        with pytest.raises(Killed):
            run(tiny(), killed_at(8), Keeper(tmp_path / name, rows))
        rows, seen = [], []
        got = run(tiny(seed=5), lambda *x, to=seen: to.append(x[0]), Keeper(tmp_path / name, rows))
        assert same(got, want) and seen == [8, 9, 10] and rows == [1, 2]
        assert same(run(tiny(seed=6), killed_at(1), Keeper(tmp_path / name, [])), want)      # it was done

        path, seen = tmp_path / f"{name} told", []
        monkeypatch.setattr(checkpoint, "EVERY", 600)           # Ctrl-C: the step ends and is saved
        with pytest.raises(KeyboardInterrupt):
            run(tiny(), told_at(4), Keeper(path))
        got = run(tiny(seed=5), lambda *x, to=seen: to.append(x[0]), Keeper(path, []))
        assert same(got, want) and seen == [5, 6, 7, 8, 9, 10]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        monkeypatch.setattr(checkpoint, "EVERY", -1)


def test_the_weaker_prover_is_there_after_a_kill(tmp_path, monkeypatch):
    """It is saved on the way of the base policy's training."""
    logger = train.Run.logger
    for name in ("whole", "killed"):
        flags = *SMOKE, *LESS.split(), "--out", tmp_path / name
        if name == "killed":
            with monkeypatch.context() as m, pytest.raises(Killed):
                m.setattr(train.Run, "logger", lambda *x: killed_at(12) if x[1] == "base" else logger(*x))
                run_main(train, *flags)
            flags += "--resume",
        run_main(train, *flags)
    for model in ("weak", "base", "strong", "q_pi", "orm"):
        files = [(tmp_path / x / model / "model.safetensors").read_bytes() for x in ("whole", "killed")]
        assert files[0] == files[1], model


def test_a_stages_seconds_are_those_of_all_its_tries(smoke_run, tmp_path):
    run, tries = Run.open(shutil.copytree(smoke_run[0], tmp_path / "run"), "cpu"), []

    def work():
        tries.append(time.sleep(0.3))
        if len(tries) == 1:
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        run.stage("twice", work)
    assert run.stage("twice", work)["seconds"] >= 0.6 and not list((run.out / "partial").iterdir())


def test_a_call_of_the_sampler_goes_on_where_it_was_killed(tmp_path):
    model, prompts = tiny(), torch.randint(1, 29, (6, 8))
    how = dict(n=4, max_new_tokens=10, stop=[0], seed=3, max_tokens_in_flight=80, logprobs=True)
    lengths = torch.tensor([8, 5, 3, 8, 7, 2])
    want, done = sample(model, prompts, lengths, **how), []
    with pytest.raises(Killed):
        sample(model, prompts, lengths, **how, partial_folder=tmp_path, progress=killed_at(3))
    got = sample(model, prompts, lengths, **how, partial_folder=tmp_path, progress=done.append)
    assert all(torch.equal(a, b) for a, b in zip(vars(got).values(), vars(want).values()))
    assert done[0] > 12                                         # 12 of 24 rows were there
    other = copy.deepcopy(model)
    torch.nn.init.normal_(other.blocks[0].mlp.up.weight)
    for changed in (dict(model=other), dict(how=how | dict(seed=4)), dict(how=how | dict(temperature=0.5)),
                    dict(prompts=prompts.flip(0))):
        args = changed.get("model", model), changed.get("prompts", prompts), lengths
        again = sample(*args, **changed.get("how", how), partial_folder=tmp_path)
        assert torch.equal(again.tokens, sample(*args, **changed.get("how", how)).tokens)


def test_a_call_of_the_verifier_goes_on_where_it_was_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(verifier, "tokens_per_forward", lambda _: 16)           # two rows at once
    model, tokens = tiny(head="scalar"), torch.randint(1, 29, (6, 8))
    ends = torch.tensor([[2, 5, 7], [1, 4, -1]]).repeat(3, 1)
    want, done = score(model, tokens, ends), []
    with pytest.raises(Killed):
        score(model, tokens, ends, killed_at(2), tmp_path)
    got = score(model, tokens, ends, done.append, tmp_path)
    assert torch.equal(got.nan_to_num(-1), want.nan_to_num(-1)) and done == [6]
    again = score(model, tokens.flip(0), ends, done.append, tmp_path)
    assert not torch.equal(again, want) and done[1:] == [2, 4, 6]


def test_a_killed_search_neither_samples_nor_searches_again(smoke_run, tmp_path, monkeypatch):
    """What one search has sampled, and Q^pi's beam for alpha = 0, the next ones find on disk until the
    command ends."""
    shutil.copytree(smoke_run[0], out := tmp_path / "run")
    run, how = Run.open(out, "cpu"), dict(ns=(1, 2), problems=7)
    for cell in (Cell("pass", **how), Cell("beam", "q_pi", **how)):
        Bench(run).measure(cell)
    with monkeypatch.context() as m:
        for name in ("minipav.sampler", "minipav.search.beam"):
            module = importlib.import_module(name)
            m.setattr(module, "decode", lambda *x, **kw: pytest.fail("sampled again"))
        for search in (("best_of_n", "q_pi"), ("majority",), ("beam", "effective")):
            Bench(run).measure(Cell(*search, **how))
        with pytest.raises(pytest.fail.Exception):
            Bench(run).measure(Cell("pass", **how | {"seed": 1}))
    run.close()
    assert not (out / "partial").exists()


def test_a_beam_goes_on_where_it_was_killed(smoke_run, tmp_path, monkeypatch):
    """In its second width, of three: the first one and the finished problems of the second are not searched
    again."""
    run, batches, module = Run.open(smoke_run[0], "cpu"), [], importlib.import_module("minipav.search.beam")
    run.sampling = run.sampling | {"partial_folder": None, "max_tokens_in_flight": 1}   # a problem at a time
    monkeypatch.setattr(type(run.task), "outcome", even)
    search_batch, problems = module.search_batch, run.problems("test", 4)

    def searched(*args):
        batches.append(args)
        if len(batches) == 7:
            raise Killed
        return search_batch(*args)

    def found(seed=0, **changes):
        s = Bench(run).search(Cell("beam", "effective", alpha=0.5))
        return METHODS["beam"].run(replace(s, **changes), problems, [1, 2, 3], seed)
    want = found()
    run.sampling["partial_folder"] = tmp_path
    monkeypatch.setattr(module, "search_batch", searched)
    with pytest.raises(Killed):
        found()
    got = found()
    assert len(batches) == 7 + 2 + 4 and any(r.right.any() for r in want)
    for a, b in zip(got, want):
        assert a.text == b.text and any(a.text) and all(torch.equal(getattr(a, k), getattr(b, k)) for k in
                                                        ("right", "solved", "tokens", "verifier_tokens", "q"))
    for i, other in enumerate((dict(seed=1), dict(alpha=1.0), dict(K=2), dict(C=2), dict(spread=0),
                               dict(quota="state"), dict(score=SCORES["q_mu"]), dict(verifier=None),
                               dict(verifier=None, exact=functools.partial(ExactValues)))):
        found(**other)
        assert len(batches) == 13 + 12 * (i + 1)                # another search
