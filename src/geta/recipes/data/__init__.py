"""Where a recipe's data comes from: one class of settings per `data.source`; each loads itself."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from geta.recipes.data.digits import DigitsData

DataSettings = Annotated[DigitsData, Field()]
"""The `data` section: which class it is follows from its `source`."""
