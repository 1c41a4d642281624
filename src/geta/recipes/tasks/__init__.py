"""What a recipe's network learns: one class of settings per `task.name`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from geta.recipes.tasks.classification import Classification

TaskSettings = Annotated[Classification, Field()]
"""The `task` section: which class it is follows from its `name`."""
