"""Handlers of requests that concern models: open, publish, quarantine, remove and pin."""
