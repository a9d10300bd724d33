"""`fewstep bench` as functions: what fewstep costs on this machine, beside what one would write or install instead."""
