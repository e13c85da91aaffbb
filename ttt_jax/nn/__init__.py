"""Parts that every network here is built from: linear maps, norms, rotary embedding, initialisers."""
