"""Sums: column by column in a `<think>` block or in the answer, and small ones by heart."""

from .chat import Check, Sample, user
from .words import Draw, Grammar, is_held

_SUM = {
    "+": Grammar("(What is|what is|what's|Compute|Calculate|calculate|Work out|How much is|how much is|) {a} + {b}(|?|.| =| = ?)", "{a}+{b}(|=|?)", "(What is|How much is|) {a} plus {b}(|?|.)",
                 "(Add|add|Please add) {a} (and|to) {b}(|.)", "(What is|Give me|Tell me) the sum of {a} and {b}(|?|.)"),
    "-": Grammar("(What is|what is|what's|Compute|Calculate|calculate|Work out|How much is|how much is|) {a} - {b}(|?|.| =| = ?)", "{a}-{b}(|=|?)", "(What is|How much is|) {a} minus {b}(|?|.)",
                 "(Subtract|subtract|Take|Please subtract) {b} from {a}(|.)", "(What is|Give me|Tell me) the difference of {a} and {b}(|?|.)"),
}  # fmt: skip
_COLUMNS = ["ones", "tens", "hundreds", "thousands"]


SMALL = 50  # sums of numbers up to this are answered directly when thinking is off


def working(a: int, op: str, b: int) -> str:
    """Column arithmetic, digit by digit, as the model writes it when it thinks."""
    lines, carry = [], 0
    for i in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10**i % 10, b // 10**i % 10
        extra = f" {op} {carry}" if carry else ""
        if op == "+":
            total = x + y + carry
            carry, digit = divmod(total, 10)
            lines.append(f"{_COLUMNS[i]}: {x} + {y}{extra} = {total}, write {digit}" + (", carry 1" if carry else ""))
        else:
            total = x - y - carry
            borrow = f"borrow, {x + 10} - {y}{extra} = {total + 10}, " if total < 0 else f"{x} - {y}{extra} = {total}, "
            carry = int(total < 0)
            lines.append(f"{_COLUMNS[i]}: {borrow}write {total % 10}")
    if op == "+" and carry:
        lines.append("carry: write 1")
    return "\n".join(lines)


def solve(a: int, op: str, b: int) -> int:
    return a + b if op == "+" else a - b


def draw_sum(d: Draw, small: bool) -> tuple[int, str, int]:
    """A small sum is one the model should know by heart: up to 20 in the evaluation, and up to 50 so that it learns the rule."""
    while True:
        if small:
            top = 20 if d.held or d.chance(0.6) else SMALL
            a, b = d.int(0, top), d.int(0, top)
        else:
            size = d.any([(10, 99), (100, 999), (100, 999)])
            a, b = d.int(*size), d.int(*d.any([size, (10, 99)]))
        op = d.any("+-")
        if op == "-" and a < b:
            a, b = b, a
        if is_held(f"{a}{op}{b}") == d.held and (max(a, b) > SMALL) != small:
            return a, op, b


def arithmetic_thinking(d: Draw) -> Sample:
    a, op, b = draw_sum(d, small=d.chance(0.1) and not d.held)
    value = solve(a, op, b)
    reply = f"<think>\n{a} {op} {b}\n{working(a, op, b)}\n</think>\n\n{a} {op} {b} = {value}"
    return Sample("arithmetic, thinking", [user(d.frame(_SUM[op]).format(a=a, b=b))], reply, Check("sum", value), thinking=True)


def arithmetic_small(d: Draw) -> Sample:
    a, op, b = draw_sum(d, small=True)
    value = solve(a, op, b)
    return Sample("arithmetic, small, no thinking", [user(d.frame(_SUM[op]).format(a=a, b=b))], f"{a} {op} {b} = {value}", Check("sum", value))


def arithmetic_shown(d: Draw) -> Sample:
    """Without thinking a larger sum is worked out in the open, so that it is right."""
    a, op, b = draw_sum(d, small=False)
    value = solve(a, op, b)
    reply = f"{a} {op} {b}\n{working(a, op, b)}\n{a} {op} {b} = {value}"
    return Sample("arithmetic, shown", [user(d.frame(_SUM[op]).format(a=a, b=b))], reply, Check("sum", value))
