"""Independent sub-trees: a search of width w is w beams of width 1 that know nothing of each other (diverse
verifier tree search, as in Hugging Face's search-and-learn, with one prefix a sub-tree)."""
from dataclasses import replace

from minipav.search.beam import search_width
from minipav.utils import progress


def dvts(s, problems, widths, seed):
    """-> a Result for each width; the answer is that of the sub-tree with the highest Q^pi in the end."""
    out, s = [], replace(s, spread=0, quota="none")
    with progress(f"sub-trees, {s.score.label}", sum(widths)) as bar:
        for width in widths:
            r = search_width(s, [p for p in problems for _ in range(width)], 1, seed)
            right, solved, q, tokens, read = (x.view(-1, width) for x in (
                r.right, r.solved, r.q, r.tokens, r.verifier_tokens))
            best = q.argmax(1)
            text = [r.text[i * width + b] for i, b in enumerate(best.tolist())]
            right = right.gather(1, best[:, None])[:, 0]
            out.append(replace(r, right=right, solved=solved.max(1).values, tokens=tokens.sum(1),
                               verifier_tokens=read.sum(1), text=text, q=q.max(1).values))
            bar.update(width)
    return out
