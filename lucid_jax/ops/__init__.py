"""Operations on arrays: no model, no mesh, no configuration."""
