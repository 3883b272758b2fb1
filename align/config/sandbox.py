"""Jinja templates come from files, so they run in Jinja's sandbox, and within the limits of `align.config.template_limits`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from jinja2 import Template, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from align.config.template_limits import (
    CONTAINERS,
    FLAT,
    ITEM,
    MAX_BITS,
    MAX_TEMPLATE,
    QUADRATIC,
    SMALL,
    STEP,
    VALUES,
    TemplateLimit,
    check_call,
    check_method,
    check_percent,
    count,
    made,
    meter,
    refuse_larger,
    size_of,
)

_QUICK_FILTERS = {"count", "d", "default", "length"}
_GROWING_FILTERS = {"batch", "center", "indent", "join", "replace", "round", "slice", "sum", "tojson", "truncate"}
_GROWING_FILTERS |= {"urlize", "wordwrap", "xmlattr"}
_LISTING_FILTERS = {"list", "sort", "unique"}
_SLOW_TESTS = {"in", "==", "eq", "equalto", "!=", "ne", "<", "lt", "lessthan", "<=", "le", ">", "gt", "greaterthan"}
_SLOW_TESTS |= {">=", "ge", "lower", "upper"}
_DICT_ATTRIBUTES = frozenset(dir(dict))


def compile_problem(error: Exception) -> str:
    """Why Jinja's parser or Python's compiler failed on a template, other than by its syntax."""
    if isinstance(error, RecursionError | MemoryError | SyntaxError):
        return f"nested too deeply for a template ({type(error).__name__})"
    return f"not a Jinja template: {type(error).__name__}: {str(error)[:200]}"


def limited(environment: ImmutableSandboxedEnvironment) -> LimitedEnvironment:
    """An environment with its filters, tests and globals, from then on within the limits."""
    environment.__class__ = LimitedEnvironment
    environment.limit()  # type: ignore[attr-defined]
    return environment  # type: ignore[return-value]


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with limits; what it renders is the same."""

    code_generator_class: type[CodeGenerator]
    intercepted_binops = frozenset({"*", "**", "%"})

    def limit(self) -> None:
        """Set the limits up, once finalize and filters are those of the templates to come."""
        self.code_generator_class = _LimitedCode
        self.globals.pop("lipsum", None)  # makes as much random text as it is asked to
        inner = self.finalize
        self.finalize = _printed if inner is None else lambda value: _printed(inner(value))
        for name in self.filters.keys() - _QUICK_FILTERS:
            self.filters[name] = _limited_filter(name, self.filters[name])
        tests: dict[str, Any] = self.tests
        tests.update({name: _counted(tests[name]) for name in _SLOW_TESTS})

    def from_string(self, source: Any, *args: Any, **kwargs: Any) -> Template:
        if isinstance(source, str) and len(source) > MAX_TEMPLATE:
            raise TemplateLimit(f"has more than {MAX_TEMPLATE:,} characters")
        return super().from_string(source, *args, **kwargs)

    def getattr(self, obj: Any, attribute: str) -> Any:
        if type(obj) is dict and attribute in obj and attribute not in _DICT_ATTRIBUTES:
            return obj[attribute]  # as Jinja finds it, without raising an error on the way; pays for the limits
        return super().getattr(obj, attribute)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return not attr.startswith("_") if type(obj) is str else super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            check_percent(left, right)
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if operator != "%" and bits > MAX_BITS:
                raise TemplateLimit(f"{operator} makes an integer of more than {MAX_BITS:,} bits")
        elif operator == "*":
            times, value = (left, right) if isinstance(left, int) else (right, left)
            refuse_larger(size_of(value) * times if isinstance(times, int) else 0, "*")
        return made(super().call_binop(context, operator, left, right), operator)

    def add(self, *values: Any) -> Any:
        """The sum of values, from left to right."""
        if all([type(value) is str for value in values]):
            if (size := sum(map(len, values))) >= SMALL:
                refuse_larger(size, "+")
                count(size)
            return "".join(values)
        total = values[0]
        for value in values[1:]:
            refuse_larger(size_of(total) + size_of(value), "+")
            total = made(total + value, "+")
        return total

    def call(
        __self, __context: Context, __obj: Any, *args: Any, **kwargs: Any
    ) -> Any:  # names as in Jinja, for **kwargs
        count(STEP)
        method = getattr(__obj, "__wrapped__", __obj)  # Jinja wraps `format`
        owner, name = getattr(method, "__self__", None), str(getattr(method, "__name__", "a call"))
        if isinstance(owner, VALUES):
            if name == "join" and args:
                args = (list(args[0]),)
            check_method(name, owner, [*args, *kwargs.values()])
        elif held := [each for each in (*args, *kwargs.values()) if isinstance(each, CONTAINERS)]:
            refuse_larger(sum(map(size_of, held)), name)
        return made(super().call(__context, __obj, *args, **kwargs), name)

    def step(self, size: int) -> bool:
        """Count a round of a loop, which prints `size` characters of the template itself."""
        count(STEP + size)
        return True

    def parts(self, *values: Any) -> tuple[Any, ...]:
        """The values to join into one text, which will not be too long."""
        refuse_larger(sum(map(size_of, values)), "~")
        return values

    def made(self, value: Any) -> Any:
        """A list, tuple or mapping that the template writes."""
        return made(value, "a list or mapping")

    def cut(self, value: Any) -> Any:
        """A slice that the template takes."""
        if isinstance(value, (str, list, tuple)) and len(value) >= SMALL:
            count(len(value))
        return value


def _printed(value: Any) -> Any:
    if type(value) is not str:
        count(size_of(made(value, "a value")))
        return value
    meter.left -= len(value)
    if meter.left < 0:
        count(0)
    return value


def _counted(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        count(STEP)
        return function(*args, **kwargs)

    return counted


def _limited_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    first = 1 if hasattr(function, "jinja_pass_arg") else 0  # after the context

    @functools.wraps(function)
    def limited(*args: Any, **kwargs: Any) -> Any:
        count(STEP)
        if name == "format":
            check_percent(str(args[first]), [*args[first + 1 :], *kwargs.values()])
        elif name in _GROWING_FILTERS or name in QUADRATIC:
            value = args[first]
            if isinstance(value, Iterator) or name in ("join", "sum"):
                value = value if isinstance(value, FLAT) else list(value)
                args = (*args[:first], value, *args[first + 1 :])
            check_call(name, value, [*args[first + 1 :], *kwargs.values()])
        elif isinstance(args[first], CONTAINERS):
            refuse_larger(size_of(args[first]), name)
        elif name in _LISTING_FILTERS and isinstance(args[first], FLAT):
            refuse_larger(ITEM * len(args[first]), name)
        return made(function(*args, **kwargs), name)

    return limited


class _LimitedCode(CodeGenerator):
    """Jinja's compiler, with calls of `LimitedEnvironment` where values grow without a call, and in loops."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        text = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        count = nodes.EnvironmentAttribute(
            f"step({text})", lineno=node.lineno
        )  # is compiled to `environment.step(...)`
        node.body.insert(0, nodes.ExprStmt(count, lineno=node.lineno))
        if node.test is not None:
            node.test = nodes.And(count, node.test, lineno=node.lineno)
        super().visit_For(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        join = "str_join"
        if frame.eval_ctx.volatile or frame.eval_ctx.autoescape:
            join = "(markup_join if context.eval_ctx.autoescape else str_join)"
        self.write(f"{join}(environment.parts(")
        self._visit_each(node.nodes, frame)
        self.write("))")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._visit_made(node, frame, super().visit_List, node.items)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        self._visit_made(node, frame, super().visit_Tuple, node.items if node.ctx == "load" else [])

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._visit_made(node, frame, super().visit_Dict, [pair.value for pair in node.items])

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        if isinstance(node.arg, nodes.Slice):
            self._visit_in("cut", node, frame, super().visit_Getitem)
        else:
            super().visit_Getitem(node, frame)

    def _visit_made(self, node: Any, frame: Frame, visit: Callable[..., None], items: list[Any]) -> None:
        if all(isinstance(item, nodes.Const) for item in items):
            visit(node, frame)
        else:
            self._visit_in("made", node, frame, visit)

    def _visit_in(self, method: str, node: Any, frame: Frame, visit: Callable[..., None]) -> None:
        self.write(f"environment.{method}(")
        visit(node, frame)
        self.write(")")

    def visit_Add(self, node: nodes.BinExpr, frame: Frame) -> None:
        terms: list[nodes.Expr] = []
        first: nodes.Expr = node
        while isinstance(first, nodes.Add):  # a sum of many is one call
            terms.insert(0, first.right)
            first = first.left
        self.write("environment.add(")
        self._visit_each([first, *terms], frame)
        self.write(")")

    def _visit_each(self, values: list[nodes.Expr], frame: Frame) -> None:
        for value in values:
            self.visit(value, frame)
            self.write(", ")
