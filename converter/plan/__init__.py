"""From a recipe to the storage of every tensor."""
