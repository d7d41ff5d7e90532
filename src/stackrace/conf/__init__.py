"""Every value, as Hydra groups; a package because Hydra wants one."""
