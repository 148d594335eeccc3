"""The relatives of PAV (docs/relatives.md): each against the formula that it is named after."""
import importlib
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import WalkPolicy, make_traces, tiny

from minipav import dpo, rewards
from minipav.attention import attention_share, last_attention, uniform_share
from minipav.prover import Prover
from minipav.rewards import REWARDS, VALUES, check_trial
from minipav.search import METHODS
from minipav.search.score import SCORES, Search
from minipav.targets import TARGETS, in_support_max, smoothed
from minipav.tasks import make_task
from minipav.tokenizer import synthetic_encoding
from minipav.traces import Env
from minipav.utils import Fail

backtrack, mcts = (importlib.import_module(f"minipav.search.{m}") for m in ("backtrack", "mcts"))


@pytest.fixture
def some():
    """Three traces, right, wrong, right: a prompt of 2 tokens and steps of 3, 2, 4; the third has one."""
    tokens = torch.randint(4, 29, (3, 11), generator=torch.Generator().manual_seed(1))
    ends = torch.tensor([[1, 4, 6, 10], [1, 4, 6, 10], [1, 5, -1, -1]])
    return make_traces(tokens, torch.tensor([11, 11, 6]), ends, reward=torch.tensor([1.0, 0.0, 1.0]))


# ---- rewards

def test_the_attention_is_what_the_last_block_reads():
    """With the unit vectors as values, a head's output is its weights; the mean is over heads."""
    model = tiny(head="scalar", n_layer=3).requires_grad_(False)
    tokens, lengths, seen = torch.randint(4, 29, (4, 8)), torch.tensor([8, 4, 1, 7]), {}
    at = model.blocks[-1].attn
    assert (at.H, at.G, at.D) == (4, 2, 8)
    hooks = [at.wv.register_forward_hook(lambda *a: torch.eye(8).repeat(4, 1, 2)),
             at.wo.register_forward_pre_hook(lambda _, args: seen.update(out=args[0]))]
    model.trunk(tokens)
    [h.remove() for h in hooks]
    want = seen["out"].view(4, 8, 4, 8).mean(2)[torch.arange(4), lengths - 1]
    assert torch.allclose(last_attention(model, tokens, lengths), want, atol=1e-5)
    assert torch.allclose(want.sum(1), torch.ones(4)) and not want[torch.arange(8) >= lengths[:, None]].any()


@pytest.mark.parametrize("shares", [lambda t: attention_share(tiny(head="scalar"), t), uniform_share],
                         ids=["attention", "uniform"])
def test_what_is_redistributed_is_the_outcome(some, shares):
    """ABC's formula: the weights sum to 1 on the response, the total is the outcome, and the return of a step
    is all of it from its first token on."""
    share, nan = shares(some), float("nan")
    steps = rewards.step_returns(REWARDS["abc"], some.reward, share.masked_fill(some.ends < 0, nan), 1.0)
    for row, n in enumerate((3, 3, 1)):
        of_step = share[row, :n + 1].diff()
        assert share[row, 0] == 0 and of_step.sum() == pytest.approx(1) and (of_step > 0).all()
        r = 0.5 * of_step * some.reward[row]                                # beta a_t R, of a step's tokens
        r[-1] += 0.5 * some.reward[row]                                         # (1 - beta) R at the end
        assert r.sum() == pytest.approx(float(some.reward[row]))
        assert torch.allclose(steps[row, :n], r.flip(0).cumsum(0).flip(0)) and (steps[row, n:] == 0).all()
    if shares is uniform_share:
        assert share[0].tolist() == pytest.approx([0, 3 / 9, 5 / 9, 1])


def test_grpo_is_the_groups_standard_score(some):
    z, tokens = VALUES["group"](SimpleNamespace(a=SimpleNamespace(group=3)), None, some, 0)
    mean, std = 2 / 3, (2 * (1 / 3) ** 2 / 2 + (2 / 3) ** 2 / 2) ** 0.5         # of 1, 0, 1; n - 1 = 2
    want = [(1 - mean) / (std + 1e-4), -mean / (std + 1e-4), (1 - mean) / (std + 1e-4)]
    assert z[:, 0].tolist() == pytest.approx(want) and z.shape == some.ends.shape and tokens == 0
    got = rewards.step_returns(REWARDS["grpo"], some.reward, z.masked_fill(some.ends < 0, float("nan")), 1.0)
    assert got[2].tolist() == pytest.approx([want[2], 0, 0]) and not REWARDS["grpo"].baseline
    with pytest.raises(Fail, match="--group 1"):
        check_trial("grpo", Prover.parse("bo4", "base"), SimpleNamespace(group=1, policy="base"))


# ---- searches

def hand_made(**fields):
    """A tree of one problem: 0 has the children 1 and 2, 1 the children 3 and 4; and room for more."""
    tree = SimpleNamespace(problems=["x"], device=torch.device("cpu"), H=4,
                           size=5, parent=torch.tensor([0, 0, 0, 1, 1]), owner=torch.zeros(9).long(),
                           ended=torch.zeros(9).bool(), **fields)
    children = torch.full((9, mcts.WIDEST + mcts.BRANCH), -1)
    children[0, :2], children[1, :2] = torch.tensor([1, 2]), torch.tensor([3, 4])
    return tree, children, torch.tensor([0.3, 0.5, 0.2, 0.1, 0.9]), torch.tensor([7.0, 4.0, 2.0, 2.0, 1.0])


@pytest.mark.parametrize("puct", [False, True])
def test_the_choice_is_that_of_the_formula(puct):
    lengths, logprob = torch.tensor([3, 5, 4, 9, 6]), torch.tensor([1., 0.2, 0.7, 0.5, 0.4]).log()
    tree, children, V, visits = hand_made(logprob=logprob, lengths=lengths)
    samples, closed = torch.tensor([9.0, 9, 0, 0, 0]), torch.zeros(9).bool()
    p = (logprob / torch.tensor([1, 2, 1, 4, 1]) ** 1.25).exp()                 # over the tokens of each step

    def value(i):
        parent = visits[tree.parent[i]]
        uct = 0.7 * (2 * parent.log() / visits[i]) ** 0.5
        return V[i] + (p[i] * parent ** 0.5 / (1 + visits[i]) if puct else uct)
    for start in (V, torch.tensor([0.3, 0.2, 0.9, 0.1, 0.9])):
        V = start
        want = max((1, 2), key=value)
        want = want if want == 2 else max((3, 4), key=value)
        state = visits, children, samples, closed, puct
        assert mcts.select(tree, torch.tensor([0]), V, *state).tolist() == [want]
    samples[0] = 2.0                                            # fewer than the root of 7 visits
    assert mcts.select(tree, torch.tensor([0]), V, visits, children, samples, closed, puct).tolist() == [0]


def test_a_subtree_that_leads_nowhere_is_closed():
    tree, children, V, visits = hand_made()
    samples, closed = torch.tensor([9.0, 12, 0, 0, 0]), torch.zeros(9).bool()
    closed[[3, 4]] = True                                       # finished
    V[1] = 2.0
    got = mcts.select(tree, torch.tensor([0]), V, visits, children, samples, closed, False)
    assert got.tolist() == [2] and closed.nonzero()[:, 0].tolist() == [1, 3, 4]
    samples[1], closed[1] = 9.0, False                          # it has some patience left
    assert mcts.select(tree, torch.tensor([0]), V, visits, children, samples, closed, False).tolist() == [1]


def test_the_back_up_is_the_visit_weighted_mean():
    tree, children, V, visits = hand_made()
    mcts.back_up(tree, torch.tensor([1]), V, visits, children)
    one = (2 * 0.1 + 1 * 0.9) / 3
    assert V[1] == pytest.approx(one) and V[0] == pytest.approx((5 * one + 2 * 0.2) / 7)
    assert visits.tolist() == [8, 5, 2, 2, 1] and V[2:].tolist() == pytest.approx([0.2, 0.1, 0.9])
    mcts.back_up(tree, torch.tensor([2]), V, visits, children)  # a dead end is the worst there is
    assert V[2] == 0
    V[4] = -0.5
    mcts.back_up(tree, torch.tensor([2]), V, visits, children)
    assert V[2] == -0.5


def test_the_quality_value_is_that_of_the_formula():
    """Built from the parent's own, whatever a back-up has made of it."""
    tree, _, V, _ = hand_made(depth=torch.tensor([0, 1, 1, 2, 2]), score=torch.tensor([0, 0.5, 0, 0, 0]),
                              path=torch.tensor([[.1], [.6], [.2], [.9], [0.]]))
    got = mcts.value(tree, torch.tensor([3, 4]), True)          # v = .5, two steps left: w = .5 / 3 (2 q - 1)
    assert got.tolist() == pytest.approx([0.5 + 0.5 / 3 * 0.8, 0.5 - 0.5 / 3])
    assert mcts.value(tree, torch.tensor([2]), True).tolist() == [0] and tree.score[2] == 0     # 0 - .6 / 4
    assert mcts.value(tree, torch.tensor([1]), False).tolist() == [0.5]


def test_backtracking_leaves_a_bad_first_step():
    """The first steps are bad, neutral, bad, and what is behind the neutral one is bad: back at the prompt a
    fourth step is positive, and so is the trace behind it."""
    steps = {0: [(1, .1), (2, .6), (3, .2), (7, 1.2)], 2: [(4, .1), (5, .2), (6, .1)],
             7: [(9, 1.4), (8, 1.3)]}
    tree = SimpleNamespace(problems=["x"], s=SimpleNamespace(C=3), device=torch.device("cpu"), H=4,
                           owner=torch.zeros(20).long(), parent=torch.zeros(20).long(), still=torch.ones(20),
                           score=torch.zeros(20), ended=torch.zeros(20).bool(), path=torch.ones(20, 1))
    visited = []

    def grow(nodes, n):
        [here] = nodes.tolist()
        visited.append(here)
        child, tree.score[child] = steps[here].pop(0)
        tree.parent[child], tree.ended[child], tree.path[9] = here, child >= 8, 0.8    # 9 is not good enough
        return torch.tensor([child])
    tree.grow = grow
    for _ in backtrack.walk(tree, [6, 100]):
        pass
    assert visited == [0, 0, 0, 2, 2, 2, 0, 7, 7]


@pytest.mark.parametrize("method", ["backtrack", "mcts", "puct", "mcts_quality"])
def test_with_exact_values_a_larger_budget_finds_more(method):
    """To within two points of what there is to find, where the policy is right once in a hundred times."""
    task = make_task("calculator", dict(H=5, min_steps=3))
    problems = [p for p in task.problems("test", 40, 0) if task.exact([p])(0, "") > 0.01][:25]
    env = Env(task, synthetic_encoding(task.phrases))
    s = Search(env, WalkPolicy(env, problems), SCORES["exact"])
    few, more, many = METHODS[method].run(s, problems, [1, 8, 96], 0)
    assert few.right.mean() + 0.1 < more.right.mean() < many.right.mean() + 0.01
    assert many.right.mean() >= 0.98
    assert (few.tokens <= more.tokens).all() and (more.tokens <= many.tokens).all()
    assert (many.right <= many.solved).all() and (few.tokens <= 3 * 5 * 4).all()
    alone = METHODS[method].run(s, problems[:7], [8], 0)[0]         # a problem's search is its own
    assert torch.equal(alone.right, more.right[:7]) and torch.equal(alone.tokens, more.tokens[:7])


# ---- training from a search

def test_dpos_gradient_is_that_of_the_formula():
    """On a tabular policy; with confidence 1 (the worst was never visited again) it is plain DPO."""
    g = torch.Generator().manual_seed(0)
    theta, ref = torch.randn(2, 3, 4, generator=g, dtype=torch.double)          # 3 states, 4 actions
    best, worst, beta = torch.tensor([0, 2, 1]), torch.tensor([3, 1, 0]), dpo.BETA
    for n_best, n_worst in ((5.0, 0.0), (5.0, 2.0), (1.0, 7.0)):
        logits, row = theta.clone().requires_grad_(), torch.arange(3)
        ratio = logits.log_softmax(1) - ref.log_softmax(1)
        h = ratio[row, best] - ratio[row, worst]
        loss = dpo.cdpo(h, torch.full((3,), n_best), torch.full((3,), n_worst))
        loss.sum().backward()
        e = min(1 - 1 / (1 + n_worst / max(1, n_best)), 0.5)
        h = h.detach()
        pull = -beta * ((1 - e) * (-beta * h).sigmoid() - e * (beta * h).sigmoid())     # d loss / d h
        want = torch.zeros(3, 4, dtype=torch.double)
        want[row, best], want[row, worst] = pull, -pull         # the log-sum-exp of a state cancels in h
        assert torch.allclose(logits.grad, want)
        if n_worst == 0:
            assert torch.allclose(loss, -(beta * h).sigmoid().log())


def test_the_log_probability_of_a_step_is_that_of_its_tokens():
    model, tokens = tiny(), torch.randint(4, 29, (3, 9))
    start, lengths = torch.tensor([1, 4, 6]), torch.tensor([3, 9, 7])
    logp = model(tokens).log_softmax(-1)
    want = [sum(logp[i, t - 1, tokens[i, t]] for t in range(start[i], lengths[i])) for i in range(3)]
    assert torch.allclose(dpo.step_logp(model, tokens, start, lengths), torch.stack(want), atol=1e-4)


def test_pairs_are_the_best_and_the_worst_sibling():
    children = torch.full((7, 3), -1)
    children[0], children[1, :1], children[2, :2] = torch.tensor([1, 2, 3]), 4, torch.tensor([5, 6])
    V = torch.tensor([0, 0.4, 0.1, 0.9, 0.5, 0.2, 0.2])         # 5 and 6 are equal, 4 is alone
    assert [x.tolist() for x in dpo.pairs(V, children)] == [[3], [2]]


# ---- verifier targets

def test_smoothing_is_the_mean_of_the_posterior():
    """Behind a uniform prior, by quadrature; an exact label stays."""
    t = make_traces(torch.zeros(1, 4).long(), torch.tensor([4]), torch.tensor([[0, 1, 2, 3]]),
                    q=torch.tensor([[0.25, 1.0, 0.0, 1.0]]), n=torch.tensor([[4, 3, 1, 1]]),
                    exact=torch.tensor([[False, False, False, True]]), cost=torch.tensor([9]))
    p = (torch.arange(100000, dtype=torch.double) + 0.5) / 100000
    got = smoothed(t).q[0]
    for i, (c, n) in enumerate(((1, 4), (3, 3), (0, 1))):
        density = p ** c * (1 - p) ** (n - c)
        assert got[i] == pytest.approx(float((p * density).sum() / density.sum()), abs=1e-5)
    assert got[3] == 1
    t.cost[:] = 0                                               # a corrupted copy, which is known to be wrong
    assert torch.equal(smoothed(t).q, t.q)


def test_the_backup_is_the_maximum_over_logged_actions():
    """Against dynamic programming on the tree of random short traces of two problems."""
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 3, (40, 5), generator=g)
    problem, reward = torch.randint(0, 2, (40,), generator=g), (torch.rand(40, generator=g) < 0.2).float()
    t = make_traces(tokens, torch.full((40,), 5), torch.arange(5).expand(40, -1), problem=problem,
                    reward=reward)
    ends = {}                       # of a whole trace: what was logged, at best
    for p, row, r in zip(problem.tolist(), tokens.tolist(), reward.tolist()):
        ends[(p, *row)] = max(r, ends.get((p, *row), 0))

    def value(node):
        if len(node) == 6:
            return ends[node]
        return max(value((*node, a)) for a in (1, 2) if any(e[:len(node) + 1] == (*node, a) for e in ends))
    got = in_support_max(t).q
    for p, row, q in zip(problem.tolist(), tokens.tolist(), got.tolist()):
        assert q == [value((p, *row[:k + 1])) for k in range(5)]
    assert 0 < got.mean() < 1


def test_dres_mean_is_cross_entropys_at_equal_variance():
    """Both are least where the prediction is the mean of the labels."""
    q, n = torch.tensor([0.0, 1.0, 1.0, 0.4]), torch.ones(4)
    m = torch.linspace(-3, 3, 6001)[:, None].expand(-1, 4)
    same = torch.stack([m, torch.full_like(m, -1.0)], -1)       # (predictions, labels, 2)
    losses = [TARGETS[name].loss(same.reshape(-1, 2), q.repeat(6001), n.repeat(6001)).view(6001, 4).sum(1)
              for name in ("bce", "dre")]
    best = [float(TARGETS["dre"].value(same[x.argmin(), 0])) for x in losses]
    assert best == pytest.approx([0.6, 0.6], abs=1e-3)
    v = torch.nn.functional.softplus(torch.tensor(-1.0)) + 1e-3
    nll = -torch.distributions.Normal(0.5, v.sqrt()).log_prob(torch.tensor(1.0)) - math.log(2 * math.pi) / 2
    got = TARGETS["dre"].loss(torch.tensor([[0.0, -1.0]]), q[1:2], n[1:2])
    assert got == pytest.approx(float(nll + 0.1 * v))
