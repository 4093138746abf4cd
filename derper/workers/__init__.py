"""Several cores for one relay: worker processes, and a supervisor that has the ports (docs/architecture.md).

::

                        ┌ supervisor ┐   accepts, answers STUN, serves the pages, starts workers anew
           connections, │            │ orders, questions
            ┌───────────┴───┐    ┌───┴───────────┐
            │   worker 0    │════│   worker 1    │   each a whole relay: TLS, clients, mesh
            └───────────────┘    └───────────────┘
                         net.siblings
"""
