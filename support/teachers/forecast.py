"""What `teacher.py --dry-run` says: how many requests, of how many tokens, for how much money.

Two sums of money: what is expected, with replies as long as those that the trace file has, and the
most that it can be, with every attempt made and every reply as long as --max-output allows.

Left out on purpose: the limit itself, which is kept call by call (calls.py).
"""

from support.teachers import providers as clients
from support.teachers.batch_api import BATCH_SHARE
from support.teachers.calls import cost, input_tokens
from support.teachers.judging import JUDGE_OUTPUT
from support.teachers.providers import PRICES_OF

USUAL_OUTPUT = 1500  # tokens of a reply: a guess, for a trace file that has none yet


def forecast(run, asked, records):
    """What --dry-run says: requests, tokens, USD. Nothing is sent, and no key is needed.

    run      teacher.py's Run
    asked    (text, the picture's (width, height) or None) of each question with something to ask,
             with --from of each reply that is to be judged
    records  what the trace file holds for this command: the next replies are thought as long
    """
    args, teacher, judge, n = run.args, run.teacher, run.judge, len(asked)
    broken = f", {len(run.calls.failed)} more have no readable picture" if run.calls.failed else ""
    what = "to be asked" if teacher else f"replies of {args.source} to be judged"
    lines = [f"{args.data}: {len(run.problems)} questions, {n} {what}{broken}."]
    said = [record for record in records if record["usage"].get("output")]
    usual = sum(r["usage"]["output"] for r in said) / len(said) if said else USUAL_OUTPUT
    guess = f"the mean of {len(said)} replies" if said else "a guess"
    if teacher:
        reads = sum(input_tokens(teacher.provider, *question) for question in asked)
        many = f"{n * args.diverse} to {n * args.attempts}" if args.attempts > 1 else n
        money = bill(teacher, "--price", n, reads, usual, args)
        lines.append(
            f"{teacher.spec}: {many} requests, {reads:,} tokens in; out {usual:.0f} each "
            f"({guess}), {args.max_output} at most. {money}"
        )
    if judge.provider in clients.ASK:
        some = "" if args.judge_all else "what the rule is not sure of; for all it would be "
        sizes = [input_tokens(judge.provider, *question) for question in asked]
        reads = sum(size + 600 + round(usual) for size in sizes)  # 600: its instructions and hints
        money = bill(judge, "--judge-price", n, reads, 300, args)
        lines.append(f"{judge.spec} judges {some or 'every reply: '}{money}")
    return "\n".join([*lines, f"{args.out} has cost ${run.calls.spent:.4f} so far."])


def bill(model, flag, n, reads, usual, args):
    """The money part of a forecast, in words; `reads`: tokens read in one attempt at all n."""
    if model.price is None:
        return f"No price of {model.name} is known: give {flag} IN OUT."
    most = args.max_output if flag == "--price" else JUDGE_OUTPUT
    share = BATCH_SHARE if args.batch and flag == "--price" else 1.0
    usd = [
        times * cost({"input": reads, "output": n * output}, model.price, share)
        for times, output in ((args.diverse, usual), (args.attempts, most))
    ]
    return f"${usd[0]:.2f} expected, ${usd[1]:.2f} at most (prices of {PRICES_OF})."
