"""Spatial functa."""
