"""Read a loop over a list of experts in a method's source, and write the method again without it.

    mask = one_hot(ids, num_classes=E).permute(2, 1, 0)
    for e in (mask.sum((-1, -2)) > 0).nonzero():            or range(E)
        slots, tokens = torch.where(mask[e].squeeze(0))
        out.index_add_(0, tokens, experts[e](x[tokens]) * weights[tokens, slots, None])

Every statement of the loop is read for what it makes (`_Reader.value`); one that makes nothing known ends the reading, so that what
is replaced is exactly `out[t] += weights[t, j] * experts[ids[t, j]](x[t])`. The rest of the method, its routing above all, stays as
it is, line by line.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from effcompile.core.site import Refusal

CALL = "_eff_experts"
"""The method that a rewritten one calls on its module: (x, ids, weights) -> what the loop adds up."""


@dataclass(frozen=True)
class Made:
    """Say what an expression of the loop makes; `of` are the names of the method that it comes from."""

    kind: str
    of: tuple[str, ...] = ()


class _Unknown(Exception):
    pass


def loop_of(kind: type[nn.Module]) -> tuple[str, ast.FunctionDef] | None:
    """Return the method of a class that adds up in a loop (`index_add_`), and its source; None where there is none or several."""
    found = []
    for name, value in vars(kind).items():
        if not inspect.isfunction(value):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(value)))
        except (OSError, TypeError, SyntaxError):
            continue
        (function,) = tree.body
        loops = [n for n in ast.walk(function) if isinstance(n, ast.For)]
        if isinstance(function, ast.FunctionDef) and any("index_add" in ast.unparse(loop) for loop in loops):
            found.append((name, function))
    return found[0] if len(found) == 1 else None


def without_loop(
    module: nn.Module, name: str, function: ast.FunctionDef, container: str
) -> Callable[..., Any] | Refusal:
    """Return `type(module).name` with its loop over `module.container` as one call of `CALL`, which the module must have then.

    The source is the class's own and is compiled under its own file name and lines, with its own globals.
    """
    own = vars(type(module))[name]
    if own.__closure__ or function.decorator_list or inspect.unwrap(own) is not own:
        return Refusal("EFF-M302", f"`{name}` is decorated, or a closure")
    try:
        body = _Reader(module, function.args.args[0].arg, container).rewritten(function.body)
    except _Unknown as why:
        return Refusal("EFF-M302", f"the loop over `{container}` is not one that is known: {why}")
    function.body, function.returns = body, None
    arguments = function.args
    arguments.defaults, arguments.kw_defaults = [], [None] * len(arguments.kwonlyargs)
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    tree = ast.increment_lineno(ast.Module([function], []), own.__code__.co_firstlineno - 1)
    whole = compile(ast.fix_missing_locations(tree), own.__code__.co_filename, "exec", dont_inherit=True)
    code = next(item for item in whole.co_consts if isinstance(item, types.CodeType))
    rewritten = types.FunctionType(code, own.__globals__, name, own.__defaults__)
    rewritten.__kwdefaults__ = own.__kwdefaults__
    return rewritten


@dataclass
class _Reader:
    module: nn.Module
    me: str
    container: str
    env: dict[str, Made] = field(default_factory=dict)
    found: tuple[str, str, str, str] | None = None  # out, x, ids, weights
    zeros: set[str] = field(default_factory=set)  # names of tensors that are new and 0

    def rewritten(self, body: Sequence[ast.stmt]) -> list[ast.stmt]:
        """Return the statements of a method with the loop replaced."""
        kept: list[ast.stmt] = []
        ours: set[str] = set()
        for statement in body:
            flat = statement.body if isinstance(statement, ast.With) and _no_grad(statement) else [statement]
            loop = isinstance(statement, ast.For) and self.found is None
            if loop:
                self._loop(statement)  # type: ignore[arg-type]
                assert self.found is not None
                ours |= set(self.env)
                out, x, ids, weights = self.found
                line = ast.parse(f"{out}.add_({self.me}.{CALL}({x}, {ids}, {weights}))").body[0]
                for node in ast.walk(line):
                    ast.copy_location(node, statement)
                kept.append(line)
            elif self.found is None and all(self._prepares(item) for item in flat):
                continue
            else:
                self._leaves(statement, ours)
                self._fills(statement)
                kept.append(statement)
        if self.found is None:
            raise _Unknown("no loop of the method itself")
        return kept

    def _prepares(self, statement: ast.stmt) -> bool:
        """Note what an assignment before the loop makes of the ids; false where it is none of ours."""
        target = _target(statement)
        if target is None:
            return False
        try:
            made = self.value(statement.value)  # type: ignore[attr-defined]
        except _Unknown:
            return False
        if made.kind not in ("one-hot", "mask-kt", "mask-tk", "counts", "some", "hit"):
            return False
        self.env[target] = made
        return True

    def _fills(self, statement: ast.stmt) -> None:
        """Note which names stand for new zeros: what a loop adds to must be nothing that the experts read."""
        stored = {
            node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        }
        self.zeros -= stored
        target = _target(statement)
        value = getattr(statement, "value", None)
        if target is not None and isinstance(value, ast.Call):
            if ast.unparse(value.func).rpartition(".")[2] in ("zeros", "zeros_like", "new_zeros"):
                self.zeros.add(target)

    def _leaves(self, statement: ast.stmt, ours: set[str]) -> None:
        """Check that a statement that stays reads nothing that goes, and leaves the ids alone once they were read."""
        names = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)}
        if self.found is not None:
            if names & ours:
                raise _Unknown(f"line {statement.lineno} reads `{sorted(names & ours)[0]}` behind the loop")
            return
        taken = {name for made in self.env.values() for name in made.of}
        if names & (taken | set(self.env)):
            raise _Unknown(f"line {statement.lineno} reads what chooses the experts, before the loop")

    def _loop(self, loop: ast.For) -> None:
        if loop.orelse or not isinstance(loop.target, ast.Name):
            raise _Unknown(f"line {loop.lineno}")
        over = self.value(loop.iter)
        if over.kind not in ("hit", "all"):
            raise _Unknown(f"line {loop.lineno} goes over something else than experts")
        self.env[loop.target.id] = Made("index", over.of)
        self._statements(loop.body)
        if self.found is None:
            raise _Unknown("nothing is added up in it")

    def _statements(self, body: Iterable[ast.stmt]) -> None:
        for statement in body:
            if self.found is not None:
                raise _Unknown(f"line {statement.lineno} comes after the sum")
            if isinstance(statement, ast.If):
                self._condition(statement)
            elif isinstance(statement, ast.AugAssign):
                self._scaled(statement)
            elif isinstance(statement, ast.Expr):
                self._added(statement)
            else:
                self._assigned(statement)

    def _condition(self, statement: ast.If) -> None:
        """Read `if tokens.numel() > 0: ...` and `if tokens.numel() == 0: continue`."""
        test = statement.test
        if not isinstance(test, ast.Compare) or statement.orelse or ast.unparse(test.comparators[0]) != "0":
            raise _Unknown(f"line {statement.lineno}")
        count = ast.unparse(test.left)
        known = [name for name, made in self.env.items() if made.kind in ("tokens", "slots")]
        if not any(
            count in (f"{name}.numel()", f"{name}.shape[0]", f"{name}.size(0)", f"len({name})") for name in known
        ):
            raise _Unknown(f"line {statement.lineno}")
        if isinstance(test.ops[0], ast.Gt | ast.NotEq):
            self._statements(statement.body)
        elif not isinstance(test.ops[0], ast.Eq) or not all(isinstance(item, ast.Continue) for item in statement.body):
            raise _Unknown(f"line {statement.lineno}")

    def _assigned(self, statement: ast.stmt) -> None:
        pair = _pair(statement)
        if pair is not None:
            made = self.value(statement.value)  # type: ignore[attr-defined]
            if made.kind not in ("where-kt", "where-tk"):
                raise _Unknown(f"line {statement.lineno}")
            names = pair if made.kind == "where-kt" else pair[::-1]
            self.env |= {names[0]: Made("slots", made.of), names[1]: Made("tokens", made.of)}
            return
        target = _target(statement)
        if target is None:
            raise _Unknown(f"line {statement.lineno}")
        self.env[target] = self.value(statement.value)  # type: ignore[attr-defined]

    def _scaled(self, statement: ast.AugAssign) -> None:
        target = statement.target
        if not isinstance(target, ast.Name) or not isinstance(statement.op, ast.Mult):
            raise _Unknown(f"line {statement.lineno}")
        self.env[target.id] = self._product(target, statement.value)

    def _added(self, statement: ast.Expr) -> None:
        """Read `out.index_add_(0, tokens, weighted)`."""
        call = statement.value
        if not _method(call, "index_add_") or call.keywords or len(call.args) != 3:  # type: ignore[attr-defined]
            raise _Unknown(f"line {statement.lineno}")
        out, (dim, where, what) = call.func.value, call.args  # type: ignore[attr-defined]
        made = self.value(what)
        if not isinstance(out, ast.Name) or out.id in self.env or ast.unparse(dim) != "0":
            raise _Unknown(f"line {statement.lineno}")
        if out.id not in self.zeros:
            raise _Unknown(f"line {statement.lineno} adds to what is not seen to be new zeros")
        if self.value(where).kind != "tokens" or made.kind != "weighted":
            raise _Unknown(f"line {statement.lineno} adds up something else than weighted results")
        x, weights, ids = made.of
        if set(made.of) & set(self.env):
            raise _Unknown(f"line {statement.lineno} reads what changes in the loop")
        self.found = (out.id, x, ids, weights)

    def value(self, node: ast.expr) -> Made:
        """Return what an expression makes."""
        if isinstance(node, ast.Name):
            if node.id in self.env:
                return self.env[node.id]
        elif isinstance(node, ast.Subscript):
            return self._item(node)
        elif isinstance(node, ast.Call):
            return self._call(node)
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            return self._product(node.left, node.right)
        elif (
            isinstance(node, ast.Compare)
            and ast.unparse(node.comparators[0]) == "0"
            and isinstance(node.ops[0], ast.Gt)
        ):
            return self._of(node.left, {"counts": "some"})
        raise _Unknown(f"line {node.lineno}: `{ast.unparse(node)}`")

    def _of(self, node: ast.expr, kinds: dict[str, str]) -> Made:
        made = self.value(node)
        if made.kind not in kinds:
            raise _Unknown(f"line {node.lineno}: `{ast.unparse(node)}`")
        return Made(kinds[made.kind], made.of)

    def _product(self, left: ast.expr, right: ast.expr) -> Made:
        sides = {made.kind: made for made in (self.value(left), self.value(right))}
        if sides.keys() != {"result", "share"} or sides["result"].of[1:] != sides["share"].of[1:]:
            raise _Unknown(f"line {left.lineno}: results and weights")
        return Made("weighted", (sides["result"].of[0], *sides["share"].of))

    def _item(self, node: ast.Subscript) -> Made:
        """Read `experts[e]`, `mask[e]`, `x[tokens]`, `x[None, tokens]`, `weights[tokens, slots]` with or without `None`."""
        where = node.slice
        if ast.unparse(node.value) == f"{self.me}.{self.container}":
            return Made("expert", self._of(where, {"index": ""}).of)
        name = node.value.id if isinstance(node.value, ast.Name) else ""
        if name in self.env:
            made = self.env[name]
            if made.kind == "index" and ast.unparse(where) == "0":
                return made
            if made.kind in ("mask-kt", "mask-tk"):
                if self._of(where, {"index": ""}).of not in ((), made.of):
                    raise _Unknown(f"line {node.lineno}: the experts of one choice, the tokens of another")
                return Made(made.kind.replace("mask", "at"), made.of)
            if made.kind == "flat-share" and ast.unparse(where) in (":, None", "(:, None)", "..., None", "(..., None)"):
                return Made("share", made.of)
        elif name:
            parts = where.elts if isinstance(where, ast.Tuple) else [where]
            nones = [isinstance(part, ast.Constant) and part.value is None for part in parts]
            made_parts = [self.value(part) for part, none in zip(parts, nones) if not none]
            kinds = [part.kind for part in made_parts]
            ids = made_parts[0].of if made_parts else ()
            if kinds == ["tokens"] and nones in ([False], [True, False]):
                return Made("rows" if len(nones) == 1 else "one-rows", (name, *ids))
            if kinds == ["tokens", "slots"] and nones in ([False, False], [False, False, True]):
                return Made("share" if len(nones) == 3 else "flat-share", (name, *ids))
        raise _Unknown(f"line {node.lineno}: `{ast.unparse(node)}`")

    def _call(self, node: ast.Call) -> Made:
        words = ast.unparse(node.func)
        last = words.rpartition(".")[2]
        keywords = {item.arg or "**": ast.unparse(item.value) for item in node.keywords}
        texts = [ast.unparse(arg) for arg in node.args]
        if last == "one_hot" and len(node.args) in (1, 2):
            count = texts[1] if len(texts) == 2 else keywords.get("num_classes", "")
            if isinstance(node.args[0], ast.Name) and self._experts(count):
                return Made("one-hot", (node.args[0].id,))
        elif words in ("torch.where", "torch.nonzero") and len(node.args) == 1:
            if keywords == ({} if last == "where" else {"as_tuple": "True"}):
                return self._of(node.args[0], {"at-kt": "where-kt", "at-tk": "where-tk"})
        elif words == "torch.greater" and texts[1:] == ["0"] and not keywords:
            return self._of(node.args[0], {"counts": "some"})
        elif words == "range" and len(node.args) == 1 and self._experts(texts[0]):
            return Made("all")
        elif words == "int" and len(node.args) == 1:
            return self._of(node.args[0], {"index": "index"})
        elif isinstance(node.func, ast.Attribute):
            return self._method(node, node.func.value, last, texts, keywords)
        if len(node.args) == 1 and not keywords and self.value(node.func).kind == "expert":
            rows = self._of(node.args[0], {"rows": "result"})
            return rows
        raise _Unknown(f"line {node.lineno}: `{ast.unparse(node)}`")

    def _method(self, node: ast.Call, on: ast.expr, name: str, texts: list[str], keywords: dict[str, str]) -> Made:
        made = self.value(on)
        kind, given = made.kind, (name, *texts)
        if kind == "one-hot" and name == "permute" and texts in (["2", "1", "0"], ["2", "0", "1"]) and not keywords:
            return Made("mask-kt" if texts == ["2", "1", "0"] else "mask-tk", made.of)
        dims = keywords.get("dim", texts[0] if texts else "")
        if kind in ("mask-kt", "mask-tk") and name == "sum" and dims in ("(-1, -2)", "(-2, -1)", "(1, 2)"):
            return Made("counts", made.of)
        if kind == "some" and name == "nonzero" and not texts and keywords in ({}, {"as_tuple": "False"}):
            return Made("hit", made.of)
        if kind == "hit" and not keywords and given in (("flatten",), ("tolist",), ("squeeze", "-1"), ("view", "-1")):
            return made
        if kind == "index" and given in (("item",), ("squeeze",)) and not keywords:
            return made
        if kind in ("at-kt", "at-tk") and given == ("squeeze", "0") and not keywords:
            return made
        if kind == "one-rows" and name == "reshape" and len(texts) == 2 and texts[0] == "-1":
            return Made("rows", made.of)
        if kind == "flat-share" and given in (("unsqueeze", "-1"), ("unsqueeze", "1")) and not keywords:
            return Made("share", made.of)
        if (
            kind in ("weighted", "result")
            and name in ("to", "type")
            and len(texts) == 1
            and texts[0].endswith(".dtype")
        ):
            return made
        raise _Unknown(f"line {node.lineno}: `{ast.unparse(node)}`")

    def _experts(self, text: str) -> bool:
        """Tell whether an expression is the number of the experts."""
        listed: Any = getattr(self.module, self.container)
        if text == f"len({self.me}.{self.container})":
            return True
        path = text.split(".")
        if path[0] != self.me or not all(part.isidentifier() for part in path):
            return False
        value: Any = self.module
        for part in path[1:]:
            value = getattr(value, part, None)
        return isinstance(value, int) and value == len(listed)


def _target(statement: ast.stmt) -> str | None:
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1 and isinstance(statement.targets[0], ast.Name):
        return statement.targets[0].id
    return None


def _pair(statement: ast.stmt) -> tuple[str, str] | None:
    if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Tuple):
        names = [item.id for item in statement.targets[0].elts if isinstance(item, ast.Name)]
        if len(names) == 2 == len(statement.targets[0].elts):
            return names[0], names[1]
    return None


def _method(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == name


def _no_grad(statement: ast.With) -> bool:
    return [ast.unparse(item.context_expr) for item in statement.items] == ["torch.no_grad()"]
