"""What stands between the products of a decoder layer, fused: norm, attention over a cache, the choice of a token."""
