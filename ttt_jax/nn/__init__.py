"""Parts of all networks: linear maps, norms, rotary embedding, initialisers."""
