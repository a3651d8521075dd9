"""YAML 1.2's plain values and nothing else: what a configuration may consist of.

Whoever wrote the text, reading it takes bounded time and memory and builds mappings, lists, texts,
numbers, truths and nothing. What YAML has besides, PyYAML builds from tags: sets, whose order
differs between the workers of a run, dates, bytes, and with other loaders any object.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import yaml

_FLOAT = re.compile(r"^[-+]?([0-9][0-9_]*)(\.[0-9_]*)?[eE][-+]?[0-9]+$")
_BOOLEAN = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_TAG = "tag:yaml.org,2002:"
_PLAIN = {
    **dict.fromkeys(("null", "bool", "int", "float", "str", "merge"), yaml.ScalarNode),
    "seq": yaml.SequenceNode,
    "map": yaml.MappingNode,
}
"""The kinds of values, by what follows the tag."""
_MOST_VALUES = 100_000
"""Each alias counts with all that it stands for: a few lines of aliases of aliases are 10^9."""
_MOST_LEVELS = 50


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain values, and no key twice.

    PyYAML follows 1.1, where `1e-3` is text (it asks for a point), `no` is false and 2026-01-01 a
    date: `resume: no` and `name: 2026-01-01` mean text here.
    """

    yaml_implicit_resolvers: ClassVar = {
        first: [
            (tag, form)
            for tag, form in forms
            if not tag.endswith((":bool", ":timestamp", ":value"))
        ]
        for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuses what PyYAML answers by silently keeping the last of equal keys."""
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise _problem(f"the key {key.value!r:.60} is there twice", key)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        """Refuses what escapes can write and no file name or terminal can hold."""
        value = super().construct_scalar(node)
        if isinstance(value, str) and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value):
            raise _problem("a text with a zero byte or half a character", node)
        return value

    def construct_number(self, node: yaml.ScalarNode) -> int:
        """Refuses what is no whole number in spite of its tag, or too long to be written again."""
        try:
            value = self.construct_yaml_int(node)
        except (ValueError, IndexError):  # Python reads no more than 4,300 digits.
            value = None
        if value is None or abs(value) >= 2**63:
            raise _problem(f"{node.value:.30} is no whole number of 64 bits", node)
        return value

    def construct_fraction(self, node: yaml.ScalarNode) -> float:
        """Refuses what is no number in spite of its tag."""
        try:
            return self.construct_yaml_float(node)
        except (ValueError, IndexError):
            raise _problem(f"{node.value!r:.30} is no number", node) from None

    def construct_truth(self, node: yaml.ScalarNode) -> bool:
        """Refuses what is neither true nor false in spite of its tag."""
        if not _BOOLEAN.match(node.value):
            raise _problem(f"{node.value!r:.30} is neither true nor false", node)
        return node.value.lower() == "true"


class PlainDumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 or 1.2 would read as something else."""


_Loader.add_implicit_resolver(f"{_TAG}bool", _BOOLEAN, list("tTfF"))
for _kind in (_Loader, PlainDumper):
    _kind.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+0123456789."))
for _name, _construct in (
    ("int", _Loader.construct_number),
    ("float", _Loader.construct_fraction),
    ("bool", _Loader.construct_truth),
):
    _Loader.add_constructor(f"{_TAG}{_name}", _construct)


def _problem(text: str, node: yaml.Node) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, text, node.start_mark)


def load_plain(text: str) -> Any:
    """The value that a text of YAML states.

    Raises:
        ValueError: it states none, or one of other kinds, of more than 100,000 values or 50 levels.
            The message continues a sentence: " at line 3: ...".
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_nodes(node)
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}" if where else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "not YAML"
        raise ValueError(f"{line}: {' '.join(str(problem).split()):.200}") from None
    except RecursionError:
        raise ValueError(f": more than {_MOST_LEVELS} levels of nesting") from None


def _check_nodes(root: yaml.Node) -> None:
    """Refuse other kinds of values, and a node that contains itself or is too large with its
    aliases written out.
    """
    waiting, count = [(root, 1)], 0
    while waiting:
        node, level = waiting.pop()
        count += 1
        if level > _MOST_LEVELS:
            raise _problem(f"more than {_MOST_LEVELS} levels of nesting", node)
        if count > _MOST_VALUES:
            raise _problem(f"more than {_MOST_VALUES} values", node)
        kind = _PLAIN.get(node.tag.removeprefix(_TAG))
        if kind is None:
            raise _problem(f"the tag {node.tag!r:.60} is none of a plain value", node)
        if not isinstance(node, kind):
            raise _problem(f"the tag {node.tag!r:.60} is of another kind of value", node)
        if isinstance(node, yaml.MappingNode):
            waiting += [(part, level + 1) for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += [(part, level + 1) for part in node.value]
