"""Recipes: a whole job as one YAML file, from the data to the files of the compact network."""
