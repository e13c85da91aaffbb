"""Many devices and many processes: meshes, sharding rules, start-up."""
