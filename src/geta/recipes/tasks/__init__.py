"""What a recipe's network learns: one class of settings per `task.name`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from geta.recipes.tasks.classification import Classification
from geta.recipes.tasks.image_text import ImageText
from geta.recipes.tasks.language_modelling import LanguageModelling
from geta.recipes.tasks.multiple_choice import MultipleChoice
from geta.recipes.tasks.question_answering import QuestionAnswering
from geta.recipes.tasks.regression import Regression
from geta.recipes.tasks.segmentation import Segmentation
from geta.recipes.tasks.super_resolution import SuperResolution

TaskSettings = Annotated[
    Classification | ImageText | LanguageModelling | MultipleChoice | QuestionAnswering | Regression | Segmentation | SuperResolution,
    Field(discriminator="name"),
]
"""The `task` section: which class it is follows from its `name`."""
