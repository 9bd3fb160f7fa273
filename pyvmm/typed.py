# SPDX-License-Identifier: Apache-2.0
"""Cheap replacements for parts of ``typing``, for modules that every start of a guest imports.

Importing ``typing`` takes a quarter of the instructions of bare Python's start, and each of its NamedTuples as many as
two modules. Type checkers see typing's own names here. Owns nothing, imports nothing of pyvmm.

At run time, :class:`NamedTuple` makes classes with the behaviour of typing's: tuples, with fields as properties,
defaults, ``_replace``, ``_asdict``, ``_make``, ``_fields`` and ``_field_defaults``. :class:`Protocol` makes classes
whose isinstance checks the members of an object. :func:`NewType` makes a second name for a type.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NamedTuple, NewType, Protocol
    from typing import runtime_checkable as checkable
else:
    from operator import itemgetter

    class _NamedTupleType(type):
        def __new__(meta, name, bases, space):
            fields = tuple(space.get("__annotations__", ()))
            space["_fields"] = space["__match_args__"] = fields
            space["_field_defaults"] = {field: space[field] for field in fields if field in space}
            space["__slots__"] = ()
            space |= {field: property(itemgetter(place)) for place, field in enumerate(fields)}
            return super().__new__(meta, name, bases, space)

    class NamedTuple(tuple, metaclass=_NamedTupleType):
        """The base of classes of named tuples, like typing's."""

        def __new__(cls, *values, **named):
            fields = cls._fields
            if named or len(values) != len(fields):
                values += cls._rest(len(values), named)
            return tuple.__new__(cls, values)

        @classmethod
        def _rest(cls, given, named):
            """Return the values of the fields after the first ``given``. Raises TypeError as a call does."""
            fields, defaults = cls._fields, cls._field_defaults
            if given > len(fields):
                raise TypeError(f"{cls.__name__}() takes {len(fields)} arguments, but {given} were given")
            if wrong := [name for name in named if name not in fields[given:]]:
                what = "multiple values for" if wrong[0] in fields else "an unexpected keyword"
                raise TypeError(f"{cls.__name__}() got {what} argument {wrong[0]!r}")
            values = {**defaults, **named}
            if missing := [name for name in fields[given:] if name not in values]:
                raise TypeError(f"{cls.__name__}() misses {', '.join(map(repr, missing))}")
            return tuple(values[name] for name in fields[given:])

        @classmethod
        def _make(cls, values):
            return cls(*values)

        def _replace(self, /, **named):
            return type(self)(**self._asdict() | named)

        __replace__ = _replace

        def _asdict(self):
            return dict(zip(self._fields, self, strict=True))

        def __getnewargs__(self):
            return tuple(self)

        def __repr__(self):
            fields = ", ".join(f"{name}={value!r}" for name, value in self._asdict().items())
            return f"{type(self).__name__}({fields})"

    class _ProtocolType(type):
        def __instancecheck__(cls, instance):
            return super().__instancecheck__(instance) or (
                "_checkable" in vars(cls) and all(hasattr(instance, name) for name in cls._checkable)
            )

    class Protocol(metaclass=_ProtocolType):
        """The base of classes that define an object's required members."""

    def checkable(cls):
        """Let isinstance check whether an object has the members of the protocol ``cls``, like typing's."""
        cls._checkable = tuple(name for name in vars(cls) if not name.startswith("_"))
        return cls

    def NewType(name, base):  # noqa: ARG001 - the name is the type checkers'
        """Return ``base``, so that making a value of the new type costs no Python call."""
        return base


__all__ = ["NamedTuple", "NewType", "Protocol", "checkable"]
