"""Where a recipe's data comes from: one class of settings per `data.source`; each loads itself."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from geta.recipes.data.captions import CaptionsData, DigitsCaptionsData
from geta.recipes.data.choices import ChoicesData
from geta.recipes.data.cifar import CifarData
from geta.recipes.data.digits import DigitsData
from geta.recipes.data.hub import HubData
from geta.recipes.data.idx import IdxData
from geta.recipes.data.image_folder import ImageFolderData
from geta.recipes.data.image_masks import ImageMasksData
from geta.recipes.data.npz import NpzData
from geta.recipes.data.patches import ImagePairsData, PicturesData
from geta.recipes.data.python import PythonData
from geta.recipes.data.squad import SquadData
from geta.recipes.data.text import StdlibData, TextData

DataSettings = Annotated[
    CaptionsData
    | ChoicesData
    | CifarData
    | DigitsCaptionsData
    | DigitsData
    | HubData
    | IdxData
    | ImageFolderData
    | ImageMasksData
    | ImagePairsData
    | NpzData
    | PicturesData
    | PythonData
    | SquadData
    | StdlibData
    | TextData,
    Field(discriminator="source"),
]
"""The `data` section: which class it is follows from its `source`."""
