"""Architectures that transformers lacks and the papers' tables have. Importing registers them with the Auto classes."""

from __future__ import annotations

from . import deepseek

__all__ = ["deepseek"]
