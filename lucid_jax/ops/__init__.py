"""Pure functions of one device's arrays: no model, mesh or configuration."""
