"""Turns messages into bytes and back, with msgspec: the one codec of all that processes tell each other.

Messages are frozen dataclasses, or msgspec Structs where one of several is meant (a Struct carries its name as a tag).
Decoding checks every field against its declared type, so a message that fits no type is refused where it arrives.
"""

from __future__ import annotations

from array import array
from functools import lru_cache
from types import UnionType
from typing import TYPE_CHECKING, Any, TypeVar, overload

import msgspec
import numpy as np

M = TypeVar("M")

if TYPE_CHECKING:
    Tokens = array[int]
    Plain = object
else:
    Tokens = array  # not subscriptable at run time before Python 3.12
    Plain = Any  # what msgspec calls any plain value
#: Token ids, 64 bits each: as an array they cross a channel, and are digested, in no time.
TOKENS = "q"


class DecodeError(Exception):
    """Bytes that are no message of the expected type."""


class EncodeError(Exception):
    """A message that holds what no other process could read: an object of the user's, or a number over 64 bits."""


def _to_known(value: object) -> object:
    if isinstance(value, array) and value.typecode == TOKENS:
        return value.tobytes()
    if isinstance(value, np.ndarray):
        # A table of block copies has named fields: its dtype is a list of names and formats.
        described = value.dtype.str if value.dtype.fields is None else value.dtype.descr
        return [described, list(value.shape), np.ascontiguousarray(value).tobytes()]
    if isinstance(value, np.generic):  # SGLang counts with some
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be told to another process")


def _from_known(kind: type, value: Any) -> object:
    if kind is array:
        return array(TOKENS, value)
    if kind is np.ndarray:
        described, shape, data = value
        if not isinstance(described, str):
            described = [tuple(each) for each in described]
        return np.frombuffer(data, np.dtype(described)).reshape(shape)
    raise TypeError(f"no message has a {kind}")


_encoder = msgspec.msgpack.Encoder(enc_hook=_to_known)


@lru_cache(maxsize=256)
def _decoder(kind: Any) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(kind, dec_hook=_from_known)


def encode(message: object) -> bytes:
    """Bytes of a message.

    Raises:
        EncodeError: something in it cannot be told.
    """
    try:
        return _encoder.encode(message)
    except (TypeError, OverflowError, ValueError, RecursionError) as error:
        raise EncodeError(str(error)) from error


def check(message: object) -> None:
    """Make sure that another process would take a message that holds what a user has passed.

    Raises:
        EncodeError: it would not.
    """
    try:
        decode(encode(message), type(message))
    except DecodeError as error:
        raise EncodeError(str(error)) from error


@overload
def decode(data: bytes, kind: type[M]) -> M: ...
@overload
def decode(data: bytes, kind: UnionType) -> Any: ...
def decode(data: bytes, kind: Any) -> Any:
    """The message of type `kind`, or of one of several, in `data`.

    Raises:
        DecodeError: there is none.
    """
    try:
        return _decoder(kind).decode(data)
    except (msgspec.DecodeError, ValueError, TypeError) as error:
        raise DecodeError(f"no {getattr(kind, '__name__', kind)}: {error}") from error
