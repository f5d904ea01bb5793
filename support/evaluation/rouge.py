"""One rationale beside the gold one: how many words, and in which order, they share.

Implements sentence BLEU without smoothing (Papineni et al. 2002) and summary-level ROUGE-L (Lin
2004) in the set-based form of the PyPI package `rouge` 1.0.1, both as the authors of Multimodal-CoT
call them.

Left out: stemming and other forms of these scores; sentence-embedding similarity, which needs one
more model to say what ROUGE-L says. Neither score knows whether a rationale is true: kinds.py.
"""

import math
import re
import sys
from bisect import bisect_left
from collections import Counter


def bleu(candidate, reference, n):
    """Sentence BLEU-n in 0..1 with uniform weights; tokens end at white space and full stops. An
    order without a match counts as the smallest positive float (as in nltk): BLEU-4 of three words
    is next to 0 even if they are the right ones. Without a common word it is 0."""
    said, gold = ([t for t in re.split(r"[\s.]", x) if t] for x in (candidate, reference))
    logs = []
    for order in range(1, n + 1):
        grams = (zip(*(x[i:] for i in range(order)), strict=False) for x in (said, gold))
        ours, theirs = map(Counter, grams)
        hits = sum(min(count, theirs[gram]) for gram, count in ours.items() if gram in theirs)
        if not hits and order == 1:
            return 0.0
        logs.append(math.log(hits / ours.total() if hits else sys.float_info.min))
    # Eq. BLEU (Papineni et al. 2002): BP exp(sum of log p_n / N)
    brevity = 1.0 if len(said) > len(gold) else math.exp(1 - len(gold) / len(said))
    return brevity * math.exp(math.fsum(x / n for x in logs))


def lcs_words(x, places):
    """The words, as a set, of one longest common subsequence of the word list x and a second, y.

    `places` maps each word of y to its positions, last first. Hunt and Szymanski (1977): ends[k] is
    where the shortest prefix of y ends that has k+1 words in common with x so far; only matching
    pairs cost. Going up from the last row, a word is taken if it stands where that prefix ends: the
    same choice among equals as walking back the full table and shortening y first.
    """
    ends, rows = [], []
    for word in x:
        if word in places:
            for j in places[word]:
                k = bisect_left(ends, j)
                ends[k : k + 1] = [j]
            rows.append((word, ends.copy()))
    found, k = set(), len(ends) - 1
    for word, ends_then in reversed(rows):
        if k >= 0 and ends_then[k] in places[word]:
            found.add(word)
            k -= 1
    return found


def rouge_l(candidate, reference):
    """Summary-level ROUGE-L F in 0..1, equal to `rouge` 1.0.1 in the authors' call.

    Its peculiarities are kept: sentences end at every full stop, the longest common subsequences of
    all pairs of sentences join in one *set* of words, and lengths count distinct words (a blank
    sentence has the word ""). A text without a sentence scores 0; the package raises.
    """
    texts = ([s for s in text.split(".") if s] for text in (candidate, reference))
    said, gold = ([" ".join(s.split()).split(" ") for s in sentences] for sentences in texts)
    if not said or not gold:
        return 0.0
    common, words = set(), [set(ours) for ours in said]
    for theirs in gold:
        places = {}
        for j in reversed(range(len(theirs))):
            places.setdefault(theirs[j], []).append(j)
        for ours, distinct in zip(said, words, strict=True):
            if not common >= places.keys() & distinct:  # else it cannot add a word
                common |= lcs_words(ours, places)
    # Eq. ROUGE-L (Lin 2004): 2 P R / (P + R)
    precision, recall = (len(common) / len(set().union(*x)) for x in (said, gold))
    return 2.0 * precision * recall / (precision + recall + 1e-8)
