"""Recipes: a file for each task, with its measured result in the first lines, and a value `RECIPE` to `run`."""

from tileformer.training.recipes.g2p import RECIPE as G2P
from tileformer.training.recipes.own import PAIRS, TEXT
from tileformer.training.recipes.poems import RECIPE as POEMS
from tileformer.training.recipes.recipe import Data, Recipe, run
from tileformer.training.recipes.reviews import RECIPE as REVIEWS

__all__ = ["RECIPES", "Data", "Recipe", "run"]
RECIPES = {recipe.name: recipe for recipe in (PAIRS, TEXT, G2P, POEMS, REVIEWS)}
