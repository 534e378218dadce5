"""How fast a recipe trains and where the time of its steps goes: `muse bench training`, `muse profile`."""
