cdef class Histogram:
    cdef public object bounds
    cdef public list counts
    cdef public long long sum

    cpdef observe(self, value, times=*)


cdef class Counters:
    cdef public long long accepts
    cdef public long long packets_received
    cdef public long long packets_received_disco
    cdef public long long bytes_received
    cdef public long long packets_sent
    cdef public long long bytes_sent
    cdef public long long packets_forwarded_in
    cdef public long long packets_forwarded_out
    cdef public long long crossed_in
    cdef public long long crossed_out
    cdef public long long moved
    cdef public long long sent_back
    cdef public long long unknown_frames
    cdef public long long protocol_errors
    cdef public long long got_ping
    cdef public long long sent_pong
    cdef public long long peer_gone_disconnected_frames
    cdef public long long peer_gone_not_here_frames
    cdef public long long home_moves_in
    cdef public long long home_moves_out
    cdef public long long write_timeouts
    cdef public long long rate_limit_waits
    cdef public long long total_dup_client_conns
    cdef public long long multiforwarder_created
    cdef public long long multiforwarder_deleted
    cdef public long long packet_forwarder_delete_other_value
    cdef public long long current_connections
    cdef public long long current_home_connections
    cdef public long long current_notideal_connections
    cdef public object http_in_progress
    cdef public object http_requests
    cdef public object tcp_rtt
    cdef public long long websocket_accepts
    cdef public object mesh_update_batch_size
    cdef public object mesh_update_loop_count
    cdef public Histogram runs
    cdef public long long control_frames
    cdef public dict packets_dropped
    cdef public dict bytes_dropped
    cdef public double _average_queue_ms
    cdef public long long _averaged

    cpdef drop(self, reason, disco, size)
