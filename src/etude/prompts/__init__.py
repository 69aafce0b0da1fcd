"""Prompt sets: built-in ones, files, functions and datasets."""

from __future__ import annotations

from etude.prompts.prompts import PromptSet, load_prompts, overlap, part_of, prompt_set_names

__all__ = ["PromptSet", "load_prompts", "overlap", "part_of", "prompt_set_names"]
