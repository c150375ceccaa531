"""Evaluations of a frozen backbone on labelled images."""
