"""Named records across the boundary of a `torch.library` operator, which takes flat arguments.

An operator's schema is generated from the fields of the records that it takes, so that their order
is stated once.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable
from typing import Any

from torch import Tensor

_SCHEMA_TYPES = {Tensor: "Tensor", int: "int", float: "float", bool: "bool", str: "str"}


def schema_of(**records: type) -> str:
    """The arguments of a schema for these records: `field` names are `record_field`.

    Args:
        **records: NamedTuple classes by the name of the operator's argument that they stand for.
    """
    arguments = []
    for name, record in records.items():
        for field, annotation in typing.get_type_hints(record).items():
            arguments.append(f"{_schema_type(annotation)} {name}_{field}")
    return ", ".join(arguments)


def flatten(*records: tuple) -> list[Any]:
    """The fields of the records, one after another."""
    return [value for record in records for value in record]


def unflatten(values: Iterable[Any], *records: Any) -> list[Any]:
    """The records again, from what an operator was given."""
    rest = list(values)
    found = []
    for record in records:
        size = len(record._fields)
        found.append(record(*rest[:size]))
        rest = rest[size:]
    return found


def _schema_type(annotation: Any) -> str:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        (inner,) = (a for a in typing.get_args(annotation) if a is not type(None))
        return f"{_schema_type(inner)}?"
    if typing.get_origin(annotation) is list:
        return f"{_schema_type(typing.get_args(annotation)[0])}[]"
    return _SCHEMA_TYPES[annotation]
